"""Files that appear whole or not at all, and the digests that tie them together."""

import hashlib
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Union

from uadtool.errors import UadtoolError


@contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it takes the place of ``path`` when the block ends well.

    The content is synced to disk before ``os.replace``, so a crash leaves the old file or the new one. When the
    block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise UadtoolError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp, and safetensors too, make files that only their owner reads
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UadtoolError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Union[str, Path]) -> None:
    """Require, before any long work, that ``path`` can be written.

    Raises:
        UadtoolError: its folder does not exist or cannot be written to.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise UadtoolError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UadtoolError(f"cannot write {path}: the folder {folder} is read-only")


def file_digest(path: Union[str, Path]) -> str:
    """``sha256:`` and the hex digest of a file's bytes."""
    sha = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                sha.update(chunk)
    except OSError as error:
        raise UadtoolError(f"cannot read {path}: {error.strerror}") from error
    return f"sha256:{sha.hexdigest()}"


def list_digest(lines: Iterable[str]) -> str:
    """``sha256:`` and the hex digest of an ordered list of strings (of the images a run used, say)."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return f"sha256:{sha.hexdigest()}"


def write_json(record: Dict[str, Any], path: Union[str, Path] = "-") -> None:
    """Write ``record`` as indented JSON to ``path``, or to stdout when it is ``-``."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Union[str, Path], schema: str) -> Dict[str, Any]:
    """Read a JSON object from ``path`` (``-``: stdin) and require that its ``schema`` is the given one.

    Raises:
        UadtoolError: the file cannot be read, is not JSON, or holds another kind of record.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
        record = json.loads(text)
    except OSError as error:
        raise UadtoolError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise UadtoolError(f"{name} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != schema:
        raise UadtoolError(f"{name} is not a {schema} file")
    return record
