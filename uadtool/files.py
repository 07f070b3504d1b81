"""Files that appear whole or not at all, JSON files, and digests."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Optional, Tuple, Union

from uadtool.errors import UadtoolError, reading

PART = ".uadtool-part"
"""Suffix of temporary files, unique to this package. Their names start with a dot."""

WRITTEN = ".uadtool-files"
"""A file in a folder of outputs that lists them, a name per line. No command takes what lies there for images."""

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
    with writing(path):
        target = _target(path)
        with _temporary(target) as (handle, temporary):
            yield temporary
            _replace(handle, temporary, target, durable)


def check_writable(path: Union[str, Path], inputs: Iterable[Optional[str]] = ()) -> None:
    """Require, before any long work, that ``path`` can be written, and remove temporary files of killed runs.

    Its folder is created if necessary.

    Raises:
        UadtoolError: the folder cannot be created or written to, or ``path`` is a folder, a device, a pipe or one of
            ``inputs``.
    """
    with writing(path):
        target = _target(path)
        if any(source is not None and os.path.realpath(source) == os.path.realpath(target) for source in inputs):
            raise UadtoolError(f"{path} is an input of this command; give the output another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, f".{glob.escape(target.name)}.")
        _rehearse(target)


@contextmanager
def claimed(path: Union[str, Path], inputs: Iterable[Optional[str]] = ()) -> Iterator[None]:
    """``check_writable``, and keep other commands from claiming ``path`` until the block ends.

    Raises:
        UadtoolError: another command has claimed it; or as ``check_writable``.
    """
    check_writable(path, inputs)
    target = _target(path)
    lock = target.with_name(f".{target.name}.lock{PART}")
    with writing(path):
        handle = _claim(lock)
    if handle is None:
        raise UadtoolError(f"another command is writing {path}; wait for it, or give this output another name")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _claim(lock: Path) -> Optional[int]:
    """The open and locked file; None if another process has locked it. Where no locks exist, it is only open."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl  # missing on Windows

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except (ImportError, OSError):
            return handle
        os.close(handle)  # before it was locked, another process took it for a leftover


def check_folder(folder: Path) -> None:
    """Require that files can be written into ``folder``, and remove temporary files of killed runs.

    Raises:
        UadtoolError: the folder cannot be written to.
    """
    with writing(folder):
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
def writing(path: Union[str, Path]) -> Iterator[None]:
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
