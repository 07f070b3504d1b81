"""Checks records against the JSON schemas in this folder, the one source of what a record may hold.

The keywords that these schemas use are compiled to functions in a few milliseconds. A general validator takes 30 ms to
import and compile, half of what ``score`` may add to the start of its runtime. Two things are stricter than in JSON
Schema: numbers must be finite, and 8.0 is not an integer. ``description`` says what a text with a ``pattern`` is.
"""

import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List

Check = Callable[[Any], str]
"""Returns what is wrong with a value, or "": ``.models[0].path must be text``, say."""

Schema = Dict[str, Any]

TYPES: Dict[str, List[type]] = {"array": [list], "boolean": [bool], "integer": [int], "null": [type(None)],
                                "number": [int, float], "object": [dict], "string": [str]}
NOUNS = {"array": "a list", "boolean": "true or false", "integer": "a whole number", "null": "null",
         "number": "a finite number", "object": "an object", "string": "text"}
BOUNDS = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}",
          "exclusiveMaximum": "below {}", "minItems": "{} or more items", "maxItems": "up to {} items",
          "minProperties": "{} or more fields", "minLength": "{} or more characters"}


def validate(record: Any, schema: str, strict: bool = False) -> None:
    """Require that a record, as ``json`` decodes it, obeys a schema.

    Args:
        schema: name of a file in this folder (``bench``) or of a definition in it (``score#/$defs/image``).
        strict: refuse unknown fields, and null in optional fields. Otherwise both are ignored.

    Raises:
        ValueError: it does not. The message names the field and says what it must be.
    """
    problem = _compiled(schema, strict)(record)
    if problem:
        raise ValueError("it" + problem if problem[0] == " " else "its " + problem.lstrip("."))


@lru_cache(maxsize=None)
def _compiled(schema: str, strict: bool) -> Check:
    name, separator, definition = schema.partition("#")
    return _compile({"$ref": f"{name}.json{separator}{definition}"}, "", strict)


@lru_cache(maxsize=None)
def _load(file: str) -> Schema:
    schema: Schema = json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return schema


def _compile(schema: Schema, file: str, strict: bool, nullable: bool = False) -> Check:
    """The check for a schema in the file ``file``. ``nullable`` allows null as well."""
    if "$ref" in schema:
        other, _, definition = schema["$ref"].partition("#/$defs/")
        document = _load(other or file)
        return _compile(document["$defs"][definition] if definition else document, other or file, strict, nullable)
    problem = f" must be {_expected(schema)}"
    if "enum" in schema or "const" in schema:
        allowed = [*schema.get("enum", [schema.get("const")]), *[None] * nullable]
        return lambda value: "" if value in allowed else problem
    makers = {"array": _array, "integer": _number, "number": _number, "object": _object, "string": _string}
    checks: Dict[type, Check] = {type(None): _accept} if nullable else {}
    for kind in _kinds(schema):
        check = makers[kind](schema, problem, file, strict) if kind in makers else _accept
        checks.update((value_type, check) for value_type in TYPES[kind])
    if set(checks.values()) == {_accept}:
        return lambda value: "" if type(value) in checks else problem
    return lambda value: checks[type(value)](value) if type(value) in checks else problem


def _accept(value: Any) -> str:
    return ""


def _number(schema: Schema, problem: str, *_: Any) -> Check:
    low, high = schema.get("minimum", -sys.float_info.max), schema.get("maximum", sys.float_info.max)
    above, below = schema.get("exclusiveMinimum", -float("inf")), schema.get("exclusiveMaximum", float("inf"))
    return lambda value: "" if low <= value <= high and above < value < below else problem


def _string(schema: Schema, problem: str, *_: Any) -> Check:
    least, search = schema.get("minLength", 0), re.compile(schema.get("pattern", "")).search
    if not least and "pattern" not in schema:
        return _accept
    return lambda value: "" if len(value) >= least and search(value) else problem


def _array(schema: Schema, problem: str, file: str, strict: bool) -> Check:
    least, most = schema.get("minItems", 0), schema.get("maxItems", sys.maxsize)
    check_item = _compile(schema["items"], file, strict)

    def check(value: Any) -> str:
        if not least <= len(value) <= most:
            return problem
        for index, item in enumerate(value):
            item_problem = check_item(item)
            if item_problem:
                return f"[{index}]{item_problem}"
        return ""

    return check


def _object(schema: Schema, problem: str, file: str, strict: bool) -> Check:
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    needed = frozenset(required)
    checks = {name: _compile(inner, file, strict, nullable=not strict and name not in required)
              for name, inner in schema.get("properties", {}).items()}
    others = schema.get("additionalProperties", True)
    check_other = (_compile(others, file, strict) if isinstance(others, dict)
                   else (lambda item: " is not a field that this version knows") if strict and not others else _accept)

    def check(value: Any) -> str:
        if len(value) < least:
            return problem
        if not value.keys() >= needed:
            return f" lacks {next(name for name in required if name not in value)}"
        for name, item in value.items():
            item_problem = checks.get(name, check_other)(item)
            if item_problem:
                return (f".{name:.60}" if name.isidentifier() else f"[{name!r:.60}]") + item_problem
        return ""

    return check


def _expected(schema: Schema) -> str:
    """What a value must be, for messages: ``a whole number (at least 1, at most 4096)``."""
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        *others, last = ("null" if value is None else value for value in schema["enum"])
        return f"{', '.join(others)} or {last}" if others else str(last)
    if "pattern" in schema:
        return str(schema["description"])
    bounds = ", ".join(text.format(schema[keyword]) for keyword, text in BOUNDS.items() if keyword in schema)
    return " or ".join(NOUNS[kind] for kind in _kinds(schema)) + f" ({bounds})" * bool(bounds)


def _kinds(schema: Schema) -> List[str]:
    kinds = schema["type"]
    return kinds if isinstance(kinds, list) else [kinds]
