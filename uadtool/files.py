"""Files that appear whole or not at all, and the digests that tie them together."""

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

from uadtool.errors import UadtoolError

MOST_JSON = 64 << 20
"""Bytes of a file that is one JSON object: hundreds of times what the largest network needs."""

PART = ".uadtool-part"
"""Suffix of temporary files, which nobody else's have; their names start with a dot."""


@contextmanager
def atomic_write(path: Union[str, Path], durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it takes the place of ``path`` when the block ends well. Where
    that is a link, it takes the place of what the link leads to.

    The content is synced to disk before ``os.replace`` and the folder after it, so a crash leaves the old file or the
    new one, and the new one once the block has ended. Without ``durable``, for one of many files that are easily made
    again, only a power cut can leave a damaged one, and it takes a tenth of the time. When the block raises, the
    temporary file is removed and ``path`` stays as it was. Who writes it must write the file that is there, and not put
    another one in its place.
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
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
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
    """Require, before any long work, that ``path`` can be written; and remove what a killed run left beside it.

    Raises:
        UadtoolError: its folder does not exist or cannot be written to, it is a device or a pipe, or one of the
            ``inputs``, which would be lost.
    """
    target = _target(path)
    folder = target.parent
    if any(one is not None and os.path.realpath(one) == os.path.realpath(target) for one in inputs):
        raise UadtoolError(f"{path} is an input of this command, and would be lost; give the output another name")
    if not folder.is_dir():
        raise UadtoolError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UadtoolError(f"cannot write {path}: the folder {folder} is read-only")
    remove_leftovers(folder, f".{glob.escape(target.name)}.")


def remove_leftovers(folder: Path, beginning: str = ".") -> None:
    """Remove the temporary files of ``atomic_write`` whose process was killed; one at work holds a lock on its own.

    Args:
        beginning: of their names, as a pattern.
    """
    for left in folder.glob(f"{beginning}*{PART}"):
        with contextlib.suppress(OSError), left.open("r+b") as file:  # r+: NFS locks no file that is open to read
            if _lock(file.fileno(), wait=False):
                left.unlink()


def _locked_temporary(target: Path) -> Tuple[int, Path]:
    """A new temporary file for ``target``, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent)
        _lock(handle, wait=True)
        if Path(name).exists():
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file until it is closed or the process ends, if the file system can and, unless told to ``wait``,
    nobody has locked it.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _target(path: Union[str, Path]) -> Path:
    """``path``, or what it leads to as a link: ``os.replace`` would replace the link, and /dev/null too."""
    given = Path(path)
    if given.exists() and not (given.is_file() or given.is_dir()):
        raise UadtoolError(f"cannot write {path}: it is not a regular file; give a file's name")
    return Path(os.path.realpath(given)) if given.is_symlink() else given


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk; not all file systems can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_identity(path: Union[str, Path]) -> Tuple[int, ...]:
    """What changes when a file is replaced or written to: device, inode, size in bytes, nanoseconds of the last change.

    Raises:
        UadtoolError: there is no such file.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise UadtoolError(f"cannot read {path}: {error.strerror}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def unchanged(path: Union[str, Path]) -> Iterator[str]:
    """Yield the digest of a file, and require that what the block reads of it is of the same content.

    Raises:
        UadtoolError: it was replaced or written to meanwhile.
    """
    before = file_identity(path)
    yield file_digest(path)
    if file_identity(path) != before:
        raise UadtoolError(f"{path} was replaced while it was read; run this again")


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
        UadtoolError: the file cannot be read, is larger than ``MOST_JSON``, is not JSON, or holds another kind of
            record, or one of a newer uadtool.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin) if str(path) == "-" else Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_JSON + 1)
        if len(text) > MOST_JSON:
            raise UadtoolError(f"{name} is not a {schema} file: it is larger than {MOST_JSON >> 20} MiB")
        record = json.loads(text)
    except OSError as error:
        raise UadtoolError(f"cannot read {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UadtoolError(f"{name} is not JSON: {error}") from error
    if isinstance(record, dict):
        refuse_newer(record.get("schema"), schema, name)
    if not isinstance(record, dict) or record.get("schema") != schema:
        raise UadtoolError(f"{name} is not a {schema} file")
    return record


def refuse_newer(found: Any, known: str, name: str) -> None:
    """Refuse the schema ``found`` in the file ``name`` if it is one that came after ``known`` (uadtool.ranges/1, say).

    Raises:
        UadtoolError: it is.
    """
    kind, _, number = known.rpartition("/")
    match = re.fullmatch(re.escape(kind) + "/([0-9]{1,9})", found) if isinstance(found, str) else None
    if match and int(match[1]) > int(number):
        raise UadtoolError(f"{name} was written by a newer uadtool ({found}); upgrade this one")
