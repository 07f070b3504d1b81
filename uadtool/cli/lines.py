"""Lines of ``score``: records to stdout as JSON or CSV, and paths from stdin."""

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, TextIO

from uadtool.errors import UadtoolError, reading
from uadtool.host import parse_time
from uadtool.terminal import printable

COLUMNS = ("path", "time", "class", "label", "score", "raw_score", "threshold", "anomalous", "nearest_class",
           "class_distance", "unknown_class", "milliseconds", "heatmap", "mask", "copy", "regions", "frame", "arrived",
           "error")
"""Columns of CSV output."""

LONGEST_PATH = 1 << 20
"""Bytes on stdin without a separator after which it is not a list of paths."""

Writer = Callable[[Dict[str, Any]], None]


def json_writer(stdout: TextIO) -> Writer:
    """Write each record as a line of JSON."""
    def write(record: Dict[str, Any]) -> None:
        if stdout.isatty():
            for name in ("pixels", "held_out"):  # kilobytes of histograms and scores
                record.pop(name, None)
        print(json.dumps(record, allow_nan=False), file=stdout, flush=True)

    return write


def csv_writer(stdout: TextIO) -> Writer:
    """Write a header now, and each ``image`` record as a line; other records are ignored.

    A terminal shows escapes for what is not in its encoding. Any other output is UTF-8, with the bytes of file names.
    Regions are a cell of JSON.
    """
    if isinstance(stdout, io.TextIOWrapper):
        if stdout.isatty():
            stdout.reconfigure(errors="backslashreplace")
        else:
            stdout.reconfigure(encoding="utf-8", errors="surrogateescape")

    def write_row(values: Iterable[Any]) -> None:
        line, for_eyes = io.StringIO(newline=""), stdout.isatty()
        row = (printable(value) if for_eyes and isinstance(value, str) else value for value in values)
        csv.writer(line).writerow(row)  # ends with CR LF, so it quotes both in names
        stdout.write(line.getvalue()[:-2] + "\n")
        stdout.flush()

    def write(record: Dict[str, Any]) -> None:
        if record["type"] == "image":
            cells = {**record, "regions": json.dumps(record["regions"])} if "regions" in record else record
            write_row(map(cells.get, COLUMNS))

    write_row(COLUMNS)
    return write


def end_line(file: str, stdout: TextIO) -> None:
    """End the last line of ``file`` if stdout appends to it: a run that was killed leaves half a line.

    Raises:
        UadtoolError: the file cannot be read.
    """
    with reading(file), Path(file).open("rb") as content:
        if os.fstat(content.fileno()).st_size and os.path.sameopenfile(content.fileno(), stdout.fileno()):
            content.seek(-1, os.SEEK_END)
            if content.read() != b"\n":
                print(file=stdout, flush=True)


def scored_images(file: str) -> Dict[str, float]:
    """The images in the JSON output of earlier runs, each with the time when it was scored (seconds since 1970).

    Lines that are no ``image`` record with a ``time`` are ignored: a run that was killed leaves half a line.

    Raises:
        UadtoolError: the file cannot be read.
    """
    known: Dict[str, float] = {}
    with reading(file), Path(file).open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(line)
                known[record["path"]] = parse_time(record["time"])
    return known


def stdin_paths(separator: bytes) -> Iterator[str]:
    """Yield each path on stdin as soon as it is complete.

    Raises:
        UadtoolError: stdin is not a list of paths.
    """
    # Not through sys.stdin: Python aborts at exit while a thread still reads from it.
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), 1 << 16):
        if len(rest) > LONGEST_PATH:
            raise UadtoolError("stdin is not a list of paths: a line does not end; after find -print0, use -0")
        *paths, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(path) for path in paths if path)
    if rest:
        yield os.fsdecode(rest)
