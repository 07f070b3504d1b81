"""Files that appear whole or not at all, JSON files, and digests."""

import contextlib
import glob
import hashlib
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional, Tuple, Union

from uadtool.errors import UadtoolError, reading

MOST_JSON = 64 << 20
"""Limit of a JSON file in characters: hundreds of times what the largest network needs."""

PART = ".uadtool-part"
"""Suffix of temporary files, unique to this package. Their names start with a dot."""


@contextmanager
def atomic_write(path: Union[str, Path], durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, or beside the target of a link; it replaces ``path`` when the block ends.

    The block must write into the temporary file, not replace it. If the block raises, the temporary file is removed and
    ``path`` stays unchanged.

    Args:
        durable: sync the content before the replacement and the folder after it. A crash then leaves the old or the new
            file, and the new file once the block has ended. Without it, writing takes a tenth of the time, but a power
            cut can leave a damaged file.

    Raises:
        UadtoolError: the file cannot be written.
    """
    target = _target(path)
    try:
        handle, temporary = _locked_temporary(target)
    except OSError as error:
        raise UadtoolError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        if durable:
            os.fsync(handle)
        temporary.replace(target)
        if durable:
            _sync_folder(target.parent)
    except OSError as error:
        raise UadtoolError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def check_writable(path: Union[str, Path], inputs: Iterable[Optional[str]] = ()) -> None:
    """Require, before any long work, that ``path`` can be written, and remove temporary files of killed runs.

    Raises:
        UadtoolError: the folder does not exist or is read-only, or ``path`` is a device, a pipe or one of ``inputs``.
    """
    target = _target(path)
    folder = target.parent
    if any(source is not None and os.path.realpath(source) == os.path.realpath(target) for source in inputs):
        raise UadtoolError(f"{path} is an input of this command; give the output another name")
    if not folder.is_dir():
        raise UadtoolError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise UadtoolError(f"cannot write {path}: the folder {folder} is read-only")
    remove_leftovers(folder, f".{glob.escape(target.name)}.")


def remove_leftovers(folder: Path, beginning: str = ".") -> None:
    """Remove temporary files of ``atomic_write`` whose process was killed. A running process holds a lock on its files.

    Args:
        beginning: pattern for the start of their names.
    """
    for leftover in folder.glob(f"{beginning}*{PART}"):
        with contextlib.suppress(OSError), leftover.open("r+b") as file:  # r+: NFS locks only files open for writing
            if _lock(file.fileno(), wait=False):
                leftover.unlink()


def _locked_temporary(target: Path) -> Tuple[int, Path]:
    """A new temporary file for ``target``, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent)
        _lock(handle, wait=True)
        if Path(name).exists():
            return handle, Path(name)
        os.close(handle)  # before it was locked, another process took it for a leftover


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file until it is closed or the process ends; returns whether that worked.

    Without ``wait``, a file that another process has locked is not locked.
    """
    try:
        import fcntl  # missing on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _target(path: Union[str, Path]) -> Path:
    """``path``, or the target of a link, because ``os.replace`` would replace the link. Devices are refused."""
    given = Path(path)
    if given.exists() and not (given.is_file() or given.is_dir()):
        raise UadtoolError(f"cannot write {path}: it is not a regular file; give the name of a file")
    return Path(os.path.realpath(given)) if given.is_symlink() else given


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_identity(path: Union[str, Path]) -> Tuple[int, ...]:
    """Device, inode, size in bytes, and nanoseconds of the last change: a new or changed file has other values.

    Raises:
        UadtoolError: the file does not exist.
    """
    with reading(path):
        status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def unchanged(path: Union[str, Path]) -> Iterator[str]:
    """Yield the digest of a file, and require that the file does not change during the block.

    Raises:
        UadtoolError: it was replaced or written to.
    """
    before = file_identity(path)
    yield file_digest(path)
    if file_identity(path) != before:
        raise UadtoolError(f"{path} was replaced while it was read; run this again")


def file_digest(path: Union[str, Path]) -> str:
    """``sha256:`` and the hex digest of a file's bytes."""
    sha = hashlib.sha256()
    with reading(path), Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return f"sha256:{sha.hexdigest()}"


def list_digest(lines: Iterable[str]) -> str:
    """``sha256:`` and the hex digest of an ordered list of strings, for example of the images of a run."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return f"sha256:{sha.hexdigest()}"


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
