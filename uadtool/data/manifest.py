"""Manifests: lists of images as CSV with a header, or as JSON Lines."""

import csv
import io
import json
import os
from typing import Any, Dict, Iterator, List, NoReturn, TextIO, Tuple

from uadtool.data import storage
from uadtool.errors import UadtoolError, reading

SUFFIXES = {".csv", ".jsonl"}
KEYS = ("path", "class", "label", "mask", "split")


def read_manifest(name: str) -> List[Dict[str, str]]:
    """The rows of a manifest: all ``KEYS``, as text without surrounding spaces, "" if missing.

    ``name`` is its path or URL. ``path`` is never empty; ``split`` is "train", "test" or "". Other columns are ignored.
    Bytes that are not UTF-8 (in file names) become Python's surrogate escapes.

    Raises:
        MissingPackage: the package that fsspec needs for this kind of URL is not installed.
        UadtoolError: the file cannot be read, or a line is broken; the message names the line.
    """
    read = _csv_rows if storage.suffix(name) == ".csv" else _jsonl_rows
    try:
        with reading(name), storage.open_file(name) as stored, io.TextIOWrapper(
                stored, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return [_checked(name, number, fields) for number, fields in read(file, name)]
    except ValueError as error:  # a null byte in the path, or not a regular file
        raise UadtoolError(f"cannot read {name}: {error}") from error


def _csv_rows(file: TextIO, path: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    try:
        for fields in reader:
            if None in fields:
                _refuse(path, reader.line_num, "has more fields than the header; quote a path with commas")
            yield reader.line_num, fields
    except csv.Error as error:
        _refuse(path, reader.reader.line_num, f"is not CSV: {error}")


def _jsonl_rows(file: TextIO, path: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse(path, number, f"is not JSON: {error}")
        if not isinstance(fields, dict):
            _refuse(path, number, "is not a JSON object")
        yield number, fields


def _checked(manifest: str, number: int, fields: Dict[str, Any]) -> Dict[str, str]:
    row = {}
    for key in KEYS:
        value = fields.get(key)
        row[key] = "" if value is None else str(value).strip()
        if isinstance(value, (dict, list)) or not _is_plain(row[key]):
            _refuse(manifest, number, f"has a {key} that is not plain text")
    if not row["path"]:
        _refuse(manifest, number, f"has no path; its fields are {', '.join(fields)[:200]}")
    if row["split"] not in ("", "train", "test"):
        _refuse(manifest, number, f"has the split {row['split']!r:.80}; use train or test")
    return row


def _is_plain(text: str) -> bool:
    """Whether a path can contain the text."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that is not an escaped byte
        return False


def _refuse(manifest: str, number: int, problem: str) -> NoReturn:
    raise UadtoolError(f"{manifest}, line {number}, {problem}")
