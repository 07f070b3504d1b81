"""JSON files whose ``schema`` says what they hold."""

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Union

from uadtool.errors import UadtoolError, reading
from uadtool.files import atomic_write

MOST_JSON = 64 << 20
"""Limit of a JSON file in characters: hundreds of times what the largest network needs."""


def write_json(record: Dict[str, Any], path: Union[str, Path] = "-") -> None:
    """Write ``record`` as indented JSON to ``path`` (``-``: stdout)."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Union[str, Path], schema: str) -> Dict[str, Any]:
    """Read a JSON object from ``path`` (``-``: stdin) and require the given ``schema``.

    Raises:
        UadtoolError: the file cannot be read, is larger than ``MOST_JSON``, is not JSON, holds another kind of record,
            or was written by a newer uadtool.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        with reading(name), nullcontext(sys.stdin) if str(path) == "-" else Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise UadtoolError(f"{name} is not a {schema} file: it is larger than {MOST_JSON >> 20} MiB")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UadtoolError(f"{name} is not JSON: {error}") from error
    if isinstance(record, dict):
        refuse_newer(record.get("schema"), schema, name)
    if not isinstance(record, dict) or record.get("schema") != schema:
        raise UadtoolError(f"{name} is not a {schema} file")
    return record


def refuse_newer(schema: Any, known: str, name: str) -> None:
    """Refuse a schema in the file ``name`` that is newer than the ``known`` version, such as uadtool.ranges/1.

    Raises:
        UadtoolError: it is newer.
    """
    kind, _, number = known.rpartition("/")
    match = re.fullmatch(re.escape(kind) + "/([0-9]{1,9})", schema) if isinstance(schema, str) else None
    if match and int(match[1]) > int(number):
        raise UadtoolError(f"{name} was written by a newer uadtool ({schema}); upgrade uadtool")
