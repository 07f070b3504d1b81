"""Images that appear in a folder, each once it is complete. Requires Linux, which reports when a file is closed.

It reports only what this machine writes, and only in folders that it already watches. Scans find the other images: on
network shares, and in folders that were moved or just made.
"""

import contextlib
import logging
import os
import queue
import stat
import sys
import threading
import time
from pathlib import Path, PurePath
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from uadtool.data.samples import SUFFIXES
from uadtool.data.storage import ignored
from uadtool.errors import UadtoolError, require
from uadtool.files import WRITTEN
from uadtool.terminal import log

SCAN_PAUSE = 1.0
"""Least number of seconds between two scans. An image that no event reports takes two scans."""

SCAN_SHARE = 0.05
"""Largest share of the time for scans: 100,000 files on a local disk take about a second, on a share more."""

WRITING = 60.0
"""Seconds after which scans also count a file that a process of this machine wrote to but has not closed. A camera that
stalls must not have half an image scored; the kernel drops events, such as that of closing, when it has too many.
"""

CHECK = 1.0
"""Seconds without an image before checking that the folder still exists: a removed folder causes no events."""

State = Tuple[int, int]
"""Time of a file's last change in nanoseconds, and its size."""


class Seen(NamedTuple):
    """A file as the last scan found it, and the number of scans in a row that found it so."""

    state: State
    scans: int


class Watch:
    """Paths of the images that are written or moved into ``folder``, or a folder in it, from now on until ``stop``.

    A file counts once its writer has closed it, and again after it is rewritten. If no event reports it, it counts once
    two scans in a row find it unchanged and not empty. Hidden files and folders and files without an image suffix do
    not count: programs that copy files write to such names first. Nor do folders of outputs (``files.WRITTEN``).

    Args:
        known: the images that count from now on only if they change, each with the time (seconds since 1970) when it
            was known; all that are there if None.

    Raises:
        UadtoolError: the folder does not exist or cannot be watched, or is removed or replaced during the iteration.
        MissingPackage: watchdog is not installed.
    """

    def __init__(self, folder: str, known: Optional[Mapping[str, float]] = None) -> None:
        if not sys.platform.startswith("linux"):
            raise UadtoolError("following a folder requires Linux; pipe paths into: uadtool score MODEL -")
        if not Path(folder).is_dir():
            raise UadtoolError(f"{folder} is not a directory")
        events, observers = require("watchdog.events", "follow"), require("watchdog.observers.inotify", "follow")
        files: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()
        writing: Dict[str, float] = {}

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc, name-defined]
            def on_modified(self, event: Any) -> None:
                if not event.is_directory:
                    writing[event.src_path] = time.monotonic()

            def on_closed(self, event: Any) -> None:
                writing.pop(event.src_path, None)
                files.put(event.src_path)

            def on_moved(self, event: Any) -> None:
                if event.dest_path and not event.is_directory:  # empty if it was moved away
                    files.put(event.dest_path)

        self._folder, self._files, self._writing = folder, files, writing
        self._yielded: Dict[str, State] = {}
        self._stopped = threading.Event()
        self._descriptor = os.open(folder, os.O_RDONLY)  # so that no other folder can get its inode number
        self._observer = observers.InotifyObserver(generate_full_events=True)  # includes moves from unwatched folders
        self._observer.schedule(Handler(), folder, recursive=True)
        old, _ = _images(folder)  # first, or an image could cause an event and still seem old
        try:
            self._observer.start()
        except OSError as error:  # for example the limit of inotify
            raise UadtoolError(f"cannot follow {folder}: {error.strerror}") from error
        new = set() if known is None else {path for path, state in old.items()
                                           if state and state[0] > 1e9 * known.get(path, -1)}
        seen = {path: Seen(state, 1 if path in new else 2) for path, state in old.items() if state}
        log.info("following %s%s", folder, f", with {len(new)} images from before" if new else "")
        threading.Thread(target=self._scan_until_stopped, args=(seen,), daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        for path in iter(self._next, None):
            assert path is not None
            inside = Path(path).relative_to(self._folder)
            if inside.suffix.lower() not in SUFFIXES or any(map(ignored, inside.parts)):
                continue
            with contextlib.suppress(OSError):  # if the share does not answer: the image's record will say so
                state = _state(path)
                if state is None or state == self._yielded.get(path) or self._is_output(inside):
                    continue
                self._yielded[path] = state
            yield path

    def _is_output(self, inside: Path) -> bool:
        return any(Path(self._folder, parent, WRITTEN).exists() for parent in inside.parents if parent.parts)

    def _scan_until_stopped(self, seen: Dict[str, Seen]) -> None:
        took = 0.0
        while not self._stopped.wait(_pause(took)):
            began = time.monotonic()
            seen = self._scan(seen)
            took = time.monotonic() - began

    def _scan(self, before: Dict[str, Seen]) -> Dict[str, Seen]:
        """Queue the files that this scan and the last one, which gave ``before``, found in the same state."""
        yielded = dict(self._yielded)
        files, unlisted = _images(self._folder)
        # A share that does not answer for a moment must not make its files new.
        seen = {path: file for path, file in before.items() if path.startswith(tuple(unlisted))} if unlisted else {}
        for path, state in files.items():
            last = before.get(path)
            if last and (state is None or (state == last.state and self._is_written(path))):
                seen[path] = last
            elif last and state == last.state:
                seen[path] = Seen(state, last.scans + 1)
                if last.scans == 1 and state != yielded.get(path):
                    self._files.put(path)
            elif state:
                seen[path] = Seen(state, 1)
        self._forget(yielded, seen)
        return seen

    def _is_written(self, path: str) -> bool:
        written = self._writing.get(path)
        return written is not None and time.monotonic() - written < WRITING

    def _forget(self, yielded: Dict[str, State], seen: Dict[str, Seen]) -> None:
        """Forget files that are gone, so that memory does not grow."""
        for path, state in yielded.items():
            if path not in seen and self._yielded.get(path) == state:
                del self._yielded[path]
        for path in list(self._writing):
            if not self._is_written(path):
                self._writing.pop(path, None)

    def _next(self) -> Optional[str]:
        while True:
            try:
                return self._files.get(timeout=CHECK)
            except queue.Empty:
                if not (self._exists() and self._observer.is_alive()):
                    raise UadtoolError(f"{self._folder} was removed or replaced and cannot be followed any longer; "
                                       "start again") from None

    def _exists(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), Path(self._folder).stat())
        except OSError:
            return False

    def stop(self) -> None:
        """End the iteration after the images found so far."""
        self._stopped.set()
        logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it logs an error if it gets an event while it stops
        self._observer.stop()
        self._files.put(None)


def _pause(took: float) -> float:
    """Seconds to wait after a scan that took so many seconds."""
    return max(SCAN_PAUSE, took / SCAN_SHARE - took)


def _images(folder: str) -> Tuple[Dict[str, Optional[State]], List[str]]:
    """The images below a folder that are not empty, each with its state, or None where a share does not answer.

    The second result are the folders that could not be listed whole, each with a final slash.
    """
    images: Dict[str, Optional[State]] = {}
    unlisted: List[str] = []
    folders = [folder]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if ignored(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if not os.path.exists(f"{entry.path}{os.sep}{WRITTEN}"):  # noqa: PTH110 as in _state
                            folders.append(entry.path)
                    elif PurePath(entry.name).suffix.lower() in SUFFIXES:
                        try:
                            state = _state(entry.path)
                        except OSError:
                            images[entry.path] = None
                            continue
                        if state and state[1]:
                            images[entry.path] = state
        except (FileNotFoundError, NotADirectoryError):  # just removed
            continue
        except OSError:
            unlisted.append(f"{here}{os.sep}")
    return images, unlisted


def _state(path: str) -> Optional[State]:
    """The state of a regular file, or None if it does not exist.

    Raises:
        OSError: a share does not answer.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 scans take twice as long with Path.stat
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None
