"""Images that appear in a folder, each once it is complete. Requires Linux, which reports when a file is closed."""

import logging
import os
import queue
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from uadtool.data.samples import SUFFIXES
from uadtool.data.storage import ignored
from uadtool.errors import UadtoolError, require

SCAN_DELAY = 0.5
"""Seconds before each of the two scans of a new folder. A file written before the folder was watched caused no event;
if both scans find it unchanged, it is complete.
"""

CHECK = 1.0
"""Seconds without an image before checking that the folder still exists: a removed folder causes no events."""

REMEMBERED = 10_000
"""Number of recent images that are not yielded twice: scans and events may find the same image."""

State = Tuple[int, int]
"""Time of a file's last change in nanoseconds, and its size."""


class Watch:
    """Paths of the images that are written or moved into ``folder``, or a folder in it, from now on until ``stop``.

    A file counts once its writer has closed it, and again after it is rewritten. Hidden files and folders and files
    without an image suffix do not count: programs that copy files write to such names first.

    Raises:
        UadtoolError: the folder does not exist or cannot be watched, or is removed or replaced during the iteration.
        MissingPackage: watchdog is not installed.
    """

    def __init__(self, folder: str) -> None:
        if not sys.platform.startswith("linux"):
            raise UadtoolError("following a folder requires Linux; pipe paths into: uadtool score MODEL -")
        if not Path(folder).is_dir():
            raise UadtoolError(f"{folder} is not a directory")
        events, observers = require("watchdog.events", "follow"), require("watchdog.observers.inotify", "follow")
        files: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()
        new_folders: "queue.SimpleQueue[Tuple[float, str, Dict[str, Optional[State]]]]" = queue.SimpleQueue()

        def scan_new_folders() -> None:
            while True:
                since, folder, before = new_folders.get()
                time.sleep(max(0.0, since + SCAN_DELAY - time.monotonic()))
                now = {path: _state(path) for path in _files(folder)}
                if not before and now:
                    new_folders.put((time.monotonic(), folder, now))
                for path, state in before.items():
                    if state and state == now.get(path):
                        files.put(path)

        def appeared(path: str, is_folder: bool) -> None:
            if is_folder:
                new_folders.put((time.monotonic(), path, {}))
            else:
                files.put(path)

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc, name-defined]
            def on_closed(self, event: Any) -> None:
                files.put(event.src_path)

            def on_moved(self, event: Any) -> None:
                if event.dest_path:  # empty if it was moved away
                    appeared(event.dest_path, event.is_directory)

            def on_created(self, event: Any) -> None:
                if event.is_directory:
                    appeared(event.src_path, True)

        threading.Thread(target=scan_new_folders, daemon=True).start()
        self._files, self._folder = files, folder
        self._descriptor = os.open(folder, os.O_RDONLY)  # so that no other folder can get its inode number
        self._observer = observers.InotifyObserver(generate_full_events=True)  # includes moves from unwatched folders
        self._observer.schedule(Handler(), folder, recursive=True)
        try:
            self._observer.start()
        except OSError as error:  # for example the limit of inotify
            raise UadtoolError(f"cannot follow {folder}: {error.strerror}") from error

    def __iter__(self) -> Iterator[str]:
        known: Dict[str, State] = {}
        for path in iter(self._next, None):
            assert path is not None
            inside = Path(path).relative_to(self._folder)
            if inside.suffix.lower() not in SUFFIXES or any(map(ignored, inside.parts)):
                continue
            state = _state(path)
            if state is None or state == known.get(path):
                continue
            known.pop(path, None)
            known[path] = state  # as the most recent
            if len(known) > REMEMBERED:
                del known[next(iter(known))]
            yield path

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
        logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it logs an error if it gets an event while it stops
        self._observer.stop()
        self._files.put(None)


def _files(folder: str) -> List[str]:
    """All files below the folder; none if it is gone."""
    return sorted(str(Path(place, name)) for place, _, names in os.walk(folder) for name in names)


def _state(path: str) -> Optional[State]:
    """The state of a file, or None if it does not exist."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None
