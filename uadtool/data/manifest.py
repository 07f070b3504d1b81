"""Manifests: lists of images as CSV with a header, or as JSON Lines.

Spreadsheets save CSV in several ways. A manifest may be UTF-8 or, with a byte order mark, UTF-16. The names of columns
may be in any case. The separator is the one that makes ``path`` a column of the header.
"""

import codecs
import csv
import io
import itertools
import json
import os
import re
import unicodedata
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, NoReturn, Sequence, TextIO, Tuple

from uadtool.data import storage
from uadtool.errors import UadtoolError, reading

SUFFIXES = {".csv", ".jsonl"}
KEYS = ("path", "class", "label", "mask", "split")

SEPARATORS = ",;\t"

_SEPARATOR_LINE = re.compile(r'sep=([^\w\s"\0]|\t)[\r\n]*', re.IGNORECASE)
"""Names the separator to Excel, as the first line of a file."""


def read_manifest(name: str) -> List[Dict[str, str]]:
    """The rows of a manifest: all ``KEYS``, as text without surrounding spaces, "" if missing.

    ``name`` is its path or URL. ``path`` is never empty; ``class`` is in NFC; ``split`` is "train", "test" or "". Other
    columns are ignored. Bytes that are not UTF-8 (in file names) become Python's surrogate escapes. A relative path
    with backslashes gets slashes if only then its file exists.

    Raises:
        MissingPackage: the package that fsspec needs for this kind of URL is not installed.
        UadtoolError: the file cannot be read, or a line is broken; the message names the line.
    """
    read = _csv_rows if storage.suffix(name) == ".csv" else _jsonl_rows
    try:
        with reading(name), storage.open_file(name) as stored, _as_text(stored) as file:
            return [_checked(name, number, fields) for number, fields in read(file, name)]
    except UnicodeDecodeError as error:
        raise UadtoolError(f"cannot read {name}: it starts as UTF-16 but is not: {error.reason}; save it as UTF-8"
                           ) from error
    except ValueError as error:  # a null byte in the path, or not a regular file
        raise UadtoolError(f"cannot read {name}: {error}") from error


def _as_text(stored: BinaryIO) -> TextIO:
    """The text of a file in UTF-8, or in UTF-16 if it starts with the byte order mark of that."""
    utf16 = stored.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    stored.seek(0)
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    return io.TextIOWrapper(stored, encoding, errors, newline="")


def _csv_rows(file: TextIO, manifest: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    before, header, separators = _header(file)
    if "\0" in header:
        _refuse(manifest, before + 1, "has null bytes; save it as UTF-8, or as UTF-16 with a byte order mark")
    separator = _separator(header, separators)
    reader = _reader(itertools.chain([header], file), separator)
    try:
        names: List[str] = next(reader, [])
        columns = _columns(manifest, before + 1, names)
        if names and "path" not in columns:
            _refuse(manifest, before + 1, f"has no column path; its columns are {_listed(names)} (separated by "
                                          f"{separator!r})")
        for values in reader:
            if any(map(str.strip, values[len(names):])):
                _refuse(manifest, before + reader.line_num,
                        f"has more fields than the header; quote a path that contains {separator!r}")
            if any(map(str.strip, values)):  # spreadsheets keep emptied rows
                yield before + reader.line_num, {
                    key: values[place] for key, place in columns.items() if place < len(values)}
    except csv.Error as error:
        _refuse(manifest, before + reader.line_num, f"is not CSV: {error}")


def _header(file: TextIO) -> Tuple[int, str, str]:
    """The number of lines before the header, the (first) line of the header, and the separators it may have."""
    separators = SEPARATORS
    for before, line in enumerate(file):
        match = None if before else _SEPARATOR_LINE.fullmatch(line)
        if match:
            separators = match[1]
        elif line.strip():
            return before, line, separators
    return 0, "", separators


def _separator(header: str, separators: str) -> str:
    """The separator that makes ``path`` a column, otherwise the one that makes the most columns."""
    def fit(separator: str) -> Tuple[bool, int]:
        try:
            names: List[str] = next(_reader([header], separator), [])
        except csv.Error:  # too long; reading the rows reports it
            names = []
        return "path" in map(_plain, names), len(names)

    return max(separators, key=fit)


def _reader(lines: Iterable[str], separator: str) -> Any:
    return csv.reader(lines, delimiter=separator, skipinitialspace=True)


def _jsonl_rows(file: TextIO, manifest: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    names: List[str] = []
    columns: Dict[str, int] = {}
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse(manifest, number, f"is not JSON: {error}")
        if not isinstance(fields, dict):
            _refuse(manifest, number, "is not a JSON object")
        if list(fields) != names:  # most lines have the fields of the line before
            names = list(fields)
            columns = _columns(manifest, number, names)
            if "path" not in columns:
                _refuse(manifest, number, f"has no path; its fields are {_listed(names)}")
        yield number, {key: fields[names[place]] for key, place in columns.items()}


def _columns(manifest: str, number: int, names: Sequence[str]) -> Dict[str, int]:
    """Which of the names of columns or fields are ``KEYS``: exactly, or else in any case and with spaces around them.

    Raises:
        UadtoolError: a key is there twice.
    """
    columns = {}
    for key in KEYS:
        found = ([place for place, name in enumerate(names) if name == key]
                 or [place for place, name in enumerate(names) if _plain(name) == key])
        if len(found) > 1:
            _refuse(manifest, number, f"has {key} twice; rename one of the columns {_listed(names)}")
        if found:
            columns[key] = found[0]
    return columns


def _plain(name: str) -> str:
    return name.strip().lower()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)[:200]


def _checked(manifest: str, number: int, fields: Dict[str, Any]) -> Dict[str, str]:
    row = {}
    for key in KEYS:
        value = fields.get(key)
        row[key] = "" if value is None else str(value).strip()
        if isinstance(value, (dict, list)) or not _is_plain_text(row[key]):
            _refuse(manifest, number, f"has a {key} that is not plain text")
    if not row["path"]:
        _refuse(manifest, number, "has no path")
    if row["split"].lower() not in ("", "train", "test"):
        _refuse(manifest, number, f"has the split {row['split']!r:.80}; use train or test")
    row["split"] = row["split"].lower()
    row["class"] = unicodedata.normalize("NFC", row["class"])
    row["path"], row["mask"] = (_with_slashes(manifest, row[key]) for key in ("path", "mask"))
    return row


def _is_plain_text(text: str) -> bool:
    """Whether a path can contain the text."""
    try:
        return not text or b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that is not an escaped byte
        return False


def _with_slashes(manifest: str, path: str) -> str:
    """A relative path of Windows with slashes, if only then its file exists on this machine; otherwise the path."""
    if "\\" not in path:
        return path
    slashed = path.replace("\\", "/")
    given, found = (storage.beside(manifest, name) for name in (path, slashed))
    return slashed if storage.exists(found) and not storage.exists(given) else path


def _refuse(manifest: str, number: int, problem: str) -> NoReturn:
    raise UadtoolError(f"{manifest}, line {number}, {problem}")
