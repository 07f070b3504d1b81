"""Manifests: lists of images as CSV with a header, or as JSON Lines."""

import csv
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NoReturn, TextIO, Tuple

from uadtool.errors import UadtoolError

SUFFIXES = {".csv", ".jsonl"}
KEYS = ("path", "class", "label", "mask", "split")


def read_manifest(path: Path) -> List[Dict[str, str]]:
    """The rows of a manifest: all of ``KEYS``, as text without spaces around it, "" where a row has none.

    ``path`` is always given; ``split`` is "train", "test" or "". Other columns are left out. Bytes that are not UTF-8
    (in file names) come as Python's surrogate escapes.

    Raises:
        UadtoolError: the file cannot be read, or a line is broken; the message names the line.
    """
    read = _csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return [_checked(path, number, fields) for number, fields in read(file, path)]
    except OSError as error:
        raise UadtoolError(f"cannot read {path}: {error.strerror}") from error


def _csv_rows(file: TextIO, path: Path) -> Iterator[Tuple[int, Dict[str, Any]]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    try:
        for fields in reader:
            if None in fields:
                _refuse(path, reader.line_num, "has more fields than the header; quote a path that has commas")
            yield reader.line_num, fields
    except csv.Error as error:
        _refuse(path, reader.reader.line_num, f"is not CSV: {error}")


def _jsonl_rows(file: TextIO, path: Path) -> Iterator[Tuple[int, Dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            _refuse(path, number, f"is not JSON: {error}")
        if not isinstance(fields, dict):
            _refuse(path, number, "is not a JSON object")
        yield number, fields


def _checked(manifest: Path, number: int, fields: Dict[str, Any]) -> Dict[str, str]:
    row = {}
    for key in KEYS:
        value = fields.get(key)
        row[key] = "" if value is None else str(value).strip()
        if isinstance(value, (dict, list)) or "\0" in row[key]:
            _refuse(manifest, number, f"has a {key} that is not plain text")
    if not row["path"]:
        _refuse(manifest, number, f"has no path; its fields are {', '.join(fields)}")
    if row["split"] not in ("", "train", "test"):
        _refuse(manifest, number, f"has the split {row['split']!r}; known are train and test")
    return row


def _refuse(manifest: Path, number: int, problem: str) -> NoReturn:
    raise UadtoolError(f"{manifest}, line {number}, {problem}")
