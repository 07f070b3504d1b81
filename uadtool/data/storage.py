"""Files on this machine, or at any URL that fsspec supports (s3://, gs://, https://, memory://) except chained URLs
(zip://a.png::s3://...).

Only this module reads remote files; other modules pass names of files to it.
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
from typing import Any, BinaryIO, Collection, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union
from urllib.parse import unquote, urlsplit

from uadtool.errors import MissingPackage, UadtoolError, reading, require
from uadtool.files import WRITTEN

LEFTOVERS = {
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information",
    "lost+found", "__macosx", "thumbs.db", "desktop.ini",
}
"""Names of what NAS devices and systems leave in folders, in lower case: thumbnails, deleted files, snapshots."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")  # not C:\


class Held(str):
    """The name of a file that is not on a disk: its ``content`` is in memory, and ``open_file`` opens that."""

    content: bytes

    def __new__(cls, name: str, content: bytes) -> "Held":
        held = super().__new__(cls, name)
        held.content = content
        return held


def is_url(name: str) -> bool:
    """Whether the name is a URL. For local files at ``file://``, see ``local``."""
    return bool(_URL.match(name))


def local(name: str) -> str:
    """The path of a ``file://`` URL; any other name as it is."""
    return unquote(name[len("file://"):]) if name.startswith("file:///") else name


def suffix(name: str) -> str:
    """The suffix of a path or URL, in lower case."""
    return PurePath(without_query(name)).suffix.lower()


def without_query(name: str) -> str:
    """A path or URL without query and fragment (``?X-Amz-Signature=...``)."""
    return urlsplit(name)._replace(query="", fragment="").geturl() if name.startswith(("http://", "https://")) else name


def beside(file: str, name: str) -> str:
    """Resolve ``name``, as it stands in ``file``: a URL, or a path that is absolute or relative to ``file``."""
    if is_url(name):
        return local(name)
    if is_url(file):
        return posixpath.join(posixpath.dirname(file), name)
    return str(Path(file).parent / name)


def exists(name: str) -> bool:
    """Whether a local file or folder exists."""
    return os.path.exists(name)  # noqa: PTH110 Path.exists raises for a name that is too long


def open_file(name: str) -> BinaryIO:
    """Open a file for reading. A file at a URL is fetched whole, in one request.

    Raises:
        OSError, ValueError: the file cannot be read, or is not a regular file (opening a FIFO would block).
        MissingPackage: the package that fsspec needs for this kind of URL is not installed.
    """
    if isinstance(name, Held):
        return io.BytesIO(name.content)
    if is_url(name):
        system, path = _file_system(name)
        with _as_os_error():
            return io.BytesIO(system.cat_file(path))
    if not stat.S_ISREG(Path(name).stat().st_mode):
        raise ValueError("not a regular file")
    return Path(name).open("rb")


def ignored(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: it is hidden, or a system left it there."""
    return name.startswith(".") or name.lower() in LEFTOVERS


Problem = Tuple[str, str]
"""The path of a folder, and the reason why it cannot be listed."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine, without what is ``ignored`` and without folders of outputs (``files.WRITTEN``).

    Files are given by their path in it.

    Links to folders are followed, but each folder is listed once.
    """

    place: Path

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.place)).name  # noqa: PTH100 resolve() would replace the name of a link

    def __truediv__(self, name: str) -> "LocalFolder":
        """A folder in this folder, whether it exists or not."""
        return LocalFolder(self.place / name)

    def exists(self) -> bool:
        return os.path.isdir(self.place)  # noqa: PTH112 Path.is_dir raises for a name that is too long

    def folders(self) -> List[str]:
        """The names of the folders in this folder, sorted.

        Raises:
            UadtoolError: the folder cannot be listed.
        """
        with reading(self.place):
            names = [child.name for child in self.place.iterdir()]
        return sorted(name for name in names if not ignored(name) and (self / name).exists()
                      and not os.path.exists(self.place / name / WRITTEN))  # noqa: PTH110 as above

    def files(self, without: Collection[str] = ()) -> Tuple[List[PurePath], List[Problem]]:
        """All files below this folder, sorted, except those in its folders ``without``; none if it does not exist.

        The second list has the folders that cannot be listed.
        """
        problems: List[Problem] = []

        def cannot_list(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                problems.append((str(error.filename), f"cannot read {error.filename}: {error.strerror}"))

        paths: List[PurePath] = []
        seen: Set[Tuple[int, int]] = set()
        try:
            for here, folders, files in os.walk(self.place, followlinks=True, onerror=cannot_list):
                try:
                    status = Path(here).stat()
                except FileNotFoundError:  # just removed
                    continue
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                inside = Path(here).relative_to(self.place)
                if WRITTEN in files and inside.parts:
                    folders.clear()
                    continue
                folders[:] = sorted(name for name in folders
                                    if not ignored(name) and (inside.parts or name not in without))
                paths += [inside / name for name in files if not ignored(name)]
        except RecursionError:  # from os.walk, before Python 3.12
            problems.append((str(self.place), f"cannot read {self.place}: its folders are nested too deeply"))
        return sorted(paths), problems

    def path(self, file: Union[PurePath, str] = "") -> str:
        """The path of a file, or of this folder."""
        return str(self.place / file)


Tree = Dict[str, Optional["Tree"]]
"""The content of a folder by name: the tree of a folder, or None for a file."""


class ListedFolder(NamedTuple):
    """A folder with a known ``tree`` at ``url``, which ends with a slash. Its methods are those of ``LocalFolder``."""

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

    def files(self, without: Collection[str] = ()) -> Tuple[List[PurePath], List[Problem]]:
        below = [PurePosixPath(name) / file for name in self.folders() if name not in without
                 for file in (self / name).files()[0]]
        return sorted([*below, *(PurePosixPath(name) for name, inside in self.tree.items() if inside is None)]), []

    def path(self, file: Union[PurePath, str] = "") -> str:
        return f"{self.url}{PurePath(file).as_posix()}" if str(file) else self.url[:-1]


Folder = Union[LocalFolder, ListedFolder]


def open_folder(name: str) -> Optional[Folder]:
    """The folder at this path or URL, or None if it does not exist. At a URL, all files are listed at once.

    Raises:
        UadtoolError: the folder cannot be listed.
        MissingPackage: as ``open_file``.
    """
    if is_url(name):
        try:
            system, path = _file_system(name)
            with _as_os_error():
                files = system.find(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UadtoolError(f"cannot read {name}: {error.strerror}") from error
        root = f"{path.rstrip('/')}/"
        tree: Tree = {}
        for file in files:
            *folders, last = parts = file[len(root):].split("/")
            if not file.startswith(root) or any(map(ignored, parts)):
                continue
            place = tree
            for part in folders:
                inside = place[part] = place.get(part) or {}
                place = inside
            place.setdefault(last, None)
        return ListedFolder(name if name.endswith("/") else f"{name}/", tree) if tree else None
    folder = LocalFolder(Path(name))
    return folder if folder.exists() else None


def _file_system(url: str) -> Tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    fsspec = require("fsspec", "remote")
    try:
        with _as_os_error():
            system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(f"{url}: {_reason(error)}") from error
    return system, path


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn any error of a file system into an OSError with a text, except for a missing package."""
    try:
        yield
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    except Exception as error:
        raise OSError(errno.EIO, _reason(error)) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
