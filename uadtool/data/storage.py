"""Where files lie: on this machine, or at a URL of anything that fsspec knows (s3://, gs://, https://, memory://), but
for its chained ones (zip://a.png::s3://...).

The one module that reads what lies elsewhere; the others have names of files.
"""

import errno
import io
import os
import posixpath
import re
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Collection, Dict, Iterator, List, NamedTuple, Optional, Protocol, Set, Tuple
from urllib.parse import unquote, urlsplit

from uadtool.errors import MissingPackage, UadtoolError, require

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")  # C:\ is none


def is_url(name: str) -> bool:
    """Does it name something elsewhere? ``file://`` names a local file, see ``local``."""
    return bool(_URL.match(name))


def local(name: str) -> str:
    """The path that a ``file://`` URL stands for; any other name as it is."""
    return unquote(name[len("file://"):]) if name.startswith("file:///") else name


def suffix(name: str) -> str:
    """That of a path or URL, in lower case."""
    return PurePath(without_query(name)).suffix.lower()


def without_query(name: str) -> str:
    """A path or URL without what the web puts behind one (``?X-Amz-Signature=...``)."""
    return urlsplit(name)._replace(query="", fragment="").geturl() if name.startswith(("http://", "https://")) else name


def beside(file: str, name: str) -> str:
    """What ``name``, a path, absolute or relative to ``file``, or a URL, stands for in ``file``."""
    if is_url(name):
        return local(name)
    if is_url(file):
        return posixpath.join(posixpath.dirname(file), name)
    return str(Path(file).parent / name)


def exists(name: str) -> bool:
    """Is there such a local file or folder?"""
    try:
        return Path(name).exists()
    except OSError:  # too long a name, say
        return False


def open_file(name: str) -> BinaryIO:
    """Open a file for reading; one at a URL is fetched whole, in one request.

    Raises:
        OSError, ValueError: it cannot be read, or is no regular file (to open a FIFO would block).
        MissingPackage: what fsspec needs for this kind of URL is not installed.
    """
    if is_url(name):
        system, path = _file_system(name)
        with _as_os_error():
            return io.BytesIO(system.cat_file(path))
    if not stat.S_ISREG(Path(name).stat().st_mode):
        raise ValueError("not a regular file")
    return Path(name).open("rb")


class Folder(Protocol):
    """A folder that can be listed, hidden files and folders left out. Files in it go by their path from here."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def __truediv__(self, name: str) -> "Folder":
        """A folder in it, whether it exists or not."""

    def exists(self) -> bool:
        """Is there such a folder?"""

    def folders(self) -> List[str]:
        """The names of the folders in it, sorted."""

    def files(self, without: Collection[str] = ()) -> List[PurePath]:
        """The files in it and below it, sorted, but for what lies in folders ``without``; none if there is no such
        folder.
        """

    def has(self, file: PurePath) -> bool:
        """Is there such a file, or folder?"""

    def path(self, file: PurePath) -> str:
        """The path or URL of a file."""


def open_folder(name: str) -> Optional[Folder]:
    """The folder of this path or URL; None if there is none. All that a URL holds is listed at once.

    Raises:
        UadtoolError: it cannot be listed.
        MissingPackage: as ``open_file``.
    """
    if is_url(name):
        try:
            system, path = _file_system(name)
            with _as_os_error():
                found = system.find(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UadtoolError(f"cannot read {name}: {error.strerror}") from error
        root = f"{path.rstrip('/')}/"
        tree: Tree = {}
        for file in found:
            *folders, last = parts = file[len(root):].split("/")
            if not file.startswith(root) or any(part.startswith(".") for part in parts):
                continue
            place = tree
            for part in folders:
                inside = place.get(part)
                if inside is None:
                    inside = place[part] = {}
                place = inside
            place.setdefault(last, None)
        return ListedFolder(name if name.endswith("/") else f"{name}/", tree) if tree else None
    folder = LocalFolder(Path(name))
    return folder if folder.exists() else None


@dataclass(frozen=True)
class LocalFolder:
    """A ``Folder`` of this machine. Links to folders are followed, each folder once."""

    place: Path

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.place)).name  # noqa: PTH100 resolve() would replace the name of a link

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.place / name)

    def exists(self) -> bool:
        try:
            return self.place.is_dir()
        except OSError:  # too long a name, say
            return False

    def folders(self) -> List[str]:
        try:
            names = [child.name for child in self.place.iterdir()]
        except OSError as error:
            raise UadtoolError(f"cannot read {self.place}: {error.strerror}") from error
        return sorted(name for name in names if not name.startswith(".") and (self / name).exists())

    def files(self, without: Collection[str] = ()) -> List[PurePath]:
        def cannot_list(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise UadtoolError(f"cannot read {error.filename}: {error.strerror}") from error

        found: List[PurePath] = []
        seen: Set[Tuple[int, int]] = set()
        try:
            for here, folders, files in os.walk(self.place, followlinks=True, onerror=cannot_list):
                try:
                    status = Path(here).stat()
                except FileNotFoundError:  # gone again
                    continue
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                inside = Path(here).relative_to(self.place)
                folders[:] = sorted(name for name in folders
                                    if not name.startswith(".") and (inside.parts or name not in without))
                found += [inside / name for name in files if not name.startswith(".")]
        except RecursionError as error:  # of os.walk, before Python 3.12
            raise UadtoolError(f"cannot read {self.place}: its folders are nested too deeply") from error
        return sorted(found)

    def has(self, file: PurePath) -> bool:
        return exists(self.path(file))

    def path(self, file: PurePath) -> str:
        return str(self.place / file)


Tree = Dict[str, Optional["Tree"]]
"""What is in a folder by name: a folder's tree, or None of a file."""


class ListedFolder(NamedTuple):
    """A ``Folder`` at ``url``, which ends with a slash, that was listed."""

    url: str
    tree: Tree

    @property
    def name(self) -> str:
        return posixpath.basename(self.url[:-1])

    def __truediv__(self, name: str) -> "ListedFolder":
        return ListedFolder(f"{self.url}{name}/", self.tree.get(name) or {})

    def exists(self) -> bool:
        return bool(self.tree)

    def folders(self) -> List[str]:
        return sorted(name for name, inside in self.tree.items() if inside)

    def files(self, without: Collection[str] = ()) -> List[PurePath]:
        below = [PurePosixPath(name) / file for name in self.folders() if name not in without
                 for file in (self / name).files()]
        return sorted([*below, *(PurePosixPath(name) for name, inside in self.tree.items() if inside is None)])

    def has(self, file: PurePath) -> bool:
        place: Optional[Tree] = self.tree
        for part in file.parts:
            if not place or part not in place:
                return False
            place = place[part]
        return True

    def path(self, file: PurePath) -> str:
        return f"{self.url}{file.as_posix()}"


def _file_system(url: str) -> Tuple[Any, str]:
    """Fsspec's file system of a URL, and the path in it."""
    fsspec = require("fsspec", "remote")
    try:
        with _as_os_error():
            system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(f"{url}: {_reason(error)}") from error
    return system, path


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Whatever a file system raises is an OSError with a text; but for packages that it lacks."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(errno.ENOENT if kind is FileNotFoundError else errno.EIO, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    return " ".join(str(error).split()) or type(error).__name__
