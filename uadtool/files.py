"""Files that appear whole or not at all, JSON files, and digests."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional, Tuple, Union

from uadtool.errors import UadtoolError, reading

MOST_JSON = 64 << 20
"""Limit of a JSON file in characters: hundreds of times what the largest network needs."""

PART = ".uadtool-part"
"""Suffix of temporary files, unique to this package. Their names start with a dot."""

UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of operations that a file system lacks. Shares and FUSE may lack fsync, of files or only of folders."""

COPIED = {*UNSUPPORTED, errno.EACCES, errno.EBUSY, errno.EEXIST, errno.EPERM, errno.ETXTBSY, errno.EXDEV}
"""Errors of replacing a file whose content can perhaps be overwritten: on object stores, SFTP without its rename
extension, merged volumes, shares and Windows while the file is open, and for a file that is itself a mount point.
"""


@contextmanager
def atomic_write(path: Union[str, Path], durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, or beside the target of a link; it replaces ``path`` when the block ends.

    The block must write into the temporary file, not replace it. If the block raises, the temporary file is removed and
    ``path`` stays unchanged. Where the file system cannot replace a file, the content is copied over ``path`` instead.

    Args:
        durable: sync the content before the replacement and the folder after it. A crash then leaves the old or the new
            file, and the new file once the block has ended. Without it, writing takes a tenth of the time, but a power
            cut can leave a damaged file.

    Raises:
        UadtoolError: the file cannot be written.
    """
    with _writing(path):
        target = _target(path)
        with _temporary(target) as (handle, temporary):
            yield temporary
            _replace(handle, temporary, target, durable)


def check_writable(path: Union[str, Path], inputs: Iterable[Optional[str]] = ()) -> None:
    """Require, before any long work, that ``path`` can be written, and remove temporary files of killed runs.

    Raises:
        UadtoolError: the folder does not exist or cannot be written to, or ``path`` is a folder, a device, a pipe or
            one of ``inputs``.
    """
    with _writing(path):
        target = _target(path)
        if any(source is not None and os.path.realpath(source) == os.path.realpath(target) for source in inputs):
            raise UadtoolError(f"{path} is an input of this command; give the output another name")
        if not target.parent.is_dir():
            raise UadtoolError(f"cannot write {path}: the folder {target.parent} does not exist")
        remove_leftovers(target.parent, f".{glob.escape(target.name)}.")
        _rehearse(target)


def check_folder(folder: Path) -> None:
    """Require that files can be written into ``folder``, and remove temporary files of killed runs.

    Raises:
        UadtoolError: the folder cannot be written to.
    """
    with _writing(folder):
        remove_leftovers(folder)
        _rehearse(folder / "file")


def remove_leftovers(folder: Path, beginning: str = ".") -> None:
    """Remove temporary files of ``atomic_write`` whose process was killed. A running process holds a lock on its files.

    Where the file system has no such locks, the files stay.

    Args:
        beginning: pattern for the start of their names.
    """
    for leftover in folder.glob(f"{beginning}*{PART}"):
        with contextlib.suppress(OSError), leftover.open("r+b") as file:  # r+: NFS locks only files open for writing
            if _lock(leftover, file.fileno(), wait=False):
                leftover.unlink()


@contextmanager
def _writing(path: Union[str, Path]) -> Iterator[None]:
    """Turn an OSError in the block, which writes ``path``, into a UadtoolError."""
    try:
        yield
    except OSError as error:
        raise UadtoolError(f"cannot write {path}: {error.strerror or error}") from error


def _rehearse(target: Path) -> None:
    """Do all that ``atomic_write`` does, with a temporary file instead of ``target``.

    Permissions say too little: shares ignore them, root has them all, and disks fill up.
    """
    with _temporary(target) as (_, existing), _temporary(target) as (handle, temporary):
        temporary.write_bytes(b"\0")
        _replace(handle, temporary, existing, durable=True)


@contextmanager
def _temporary(target: Path) -> Iterator[Tuple[int, Path]]:
    """Yield a new temporary file for ``target``, open and locked, and its path. The block may move the file."""
    handle, path = _locked_temporary(target)
    try:
        yield handle, path
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def _locked_temporary(target: Path) -> Tuple[int, Path]:
    while True:
        path = target.with_name(f".{target.name}.{os.urandom(4).hex()}{PART}")
        try:
            # Not by tempfile, whose files only their owner can read: a later chmod would fail on some shares.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        _lock(path, handle, wait=True)
        if path.exists():
            return handle, path
        os.close(handle)  # before it was locked, another process took it for a leftover


def _lock(path: Path, handle: int, wait: bool) -> bool:
    """Lock the open file at ``path`` until it is closed or the process ends; returns whether that worked.

    Without ``wait``, a file that another process has locked is not locked.
    """
    try:
        import fcntl  # missing on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError:  # SMB enforces locks: nobody could write the file by its path, see flock(2)
        fcntl.flock(handle, fcntl.LOCK_UN)
        return False
    return True


def _replace(handle: int, temporary: Path, target: Path, durable: bool) -> None:
    """Move ``temporary``, open as ``handle``, over ``target``, or copy its content where that is impossible."""
    if durable:
        _sync(handle)
    try:
        temporary.replace(target)
    except OSError as error:
        if error.errno not in COPIED:
            raise
        shutil.copyfile(temporary, target)
        if durable:
            with target.open("r+b") as file:
                _sync(file.fileno())
    if durable:
        _sync_folder(target.parent)


def _target(path: Union[str, Path]) -> Path:
    """``path``, or the target of a link, because ``os.replace`` would replace the link. Only regular files."""
    given = Path(path)
    if given.exists() and not given.is_file():
        raise UadtoolError(f"cannot write {path}: it is not a regular file; give the name of a file")
    return Path(os.path.realpath(given)) if given.is_symlink() else given


def _sync(handle: int) -> None:
    """Write an open file or folder to disk, if the file system supports it.

    Raises:
        OSError: its content may be lost: the disk is broken or full, or a quota is reached.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, as ``_sync``."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # on Windows, or without the permission to list it
        return
    try:
        _sync(handle)
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
