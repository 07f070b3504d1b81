"""The package's own validator against another implementation, and the messages that users see."""

import json
import random

import jsonschema
import pytest
from conftest import METADATA, SCHEMAS, validate
from fuzz import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from records import bench_record, model, score_records

from uadtool.schemas.validation import BOUNDS, TYPES
from uadtool.schemas.validation import validate as check

KEYWORDS = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "pattern", *BOUNDS}
ANNOTATIONS = {"$schema", "$defs", "$ref", "title", "description", "contentEncoding"}
RUN, *IMAGES, SUMMARY = score_records("m.onnx")
RECORDS = {
    "score#/$defs/run": {**RUN, "shard": {"index": 1, "count": 2}}, "score#/$defs/image": IMAGES[0],
    "score#/$defs/error": IMAGES[-1], "score#/$defs/summary": SUMMARY, "bench": bench_record(model("m.onnx")),
    "model": json.loads(METADATA.to_json()),
}


def schemas_in(schema):
    yield schema
    for name in ("properties", "$defs"):
        for inner in schema.get(name, {}).values():
            yield from schemas_in(inner)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from schemas_in(schema[name])


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda path: path.stem)
def test_schemas_are_strict_and_have_keywords_that_the_validator_knows(path):
    whole = json.loads(path.read_text())
    for schema in schemas_in({key: value for key, value in whole.items() if key != "oneOf"}):
        assert schema.keys() <= KEYWORDS | ANNOTATIONS or path.stem == "compare"  # which is only printed
        assert "properties" not in schema or "additionalProperties" in schema or path.stem == "checkpoint"
        assert "pattern" not in schema or "description" in schema
        assert set(schema.get("type", "")) <= TYPES.keys() or schema["type"] in TYPES


@settings(max_examples=500)
@given(st.sampled_from(sorted(RECORDS)), st.integers(0, 2**32))
def test_another_implementation_agrees(name, seed):
    """Apart from numbers that are not finite, which it takes for numbers."""
    text = fuzz.mutate_json(json.dumps(RECORDS[name]).encode(), random.Random(seed)).decode().partition("\n")[0]
    record = json.loads(text)
    try:
        validate(record, name)
        accepted = not any(word in text for word in ("NaN", "Infinity", "0" * 400))
    except jsonschema.ValidationError:
        accepted = False
    if accepted:
        check(record, name, strict=True)
    else:
        with pytest.raises(ValueError, match=r"^its? .*(must be|lacks|is not a field)"):
            check(record, name, strict=True)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("model", {"threshold": 10**400}, "its threshold must be a finite number"),
    ("model", {"map_size": [8.0, 8]}, r"its map_size\[0\] must be a whole number \(at least 1, at most 4096\)"),
    ("model", {"precision": "int4"}, "its precision must be fp32, fp16, int8 or mixed"),
    ("model", {"target": 3}, "its target must be text without lone surrogates, or null for any runtime"),
    ("model", {"a b\n": 3}, r"its \['a b\\n'\] is not a field that this version knows"),
    ("bench", {"models": [{}]}, r"its models\[0\] lacks model"),
    ("score#/$defs/run", {"model": {**RUN["model"], "digest": "sha256:0"}},
     "its model.digest must be sha256: and 64 hexadecimal digits"),
    ("score#/$defs/summary", {"metrics": {}}, r"its metrics must be an object \(1 or more fields\)"),
])
def test_messages_name_the_field_and_say_what_it_must_be(name, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check({**RECORDS[name], **changes}, name, strict=True)


def test_readers_ignore_fields_of_later_versions_and_null_in_optional_ones():
    check({**RECORDS["score#/$defs/image"], "class": None, "later": 1}, "score#/$defs/image")
    for changes in ({"later": 1}, {"class": None}):
        with pytest.raises(ValueError, match=r"^its "):
            check({**RECORDS["score#/$defs/image"], **changes}, "score#/$defs/image", strict=True)
    with pytest.raises(ValueError, match=r"^its score must be"):
        check({**RECORDS["score#/$defs/image"], "score": None}, "score#/$defs/image")
