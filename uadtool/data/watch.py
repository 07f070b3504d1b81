"""Images that appear in a folder, each as soon as it is whole. On Linux, whose kernel tells when a file is closed."""

import os
import queue
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from uadtool.data.dataset import SUFFIXES
from uadtool.errors import UadtoolError, require

LOOK = 0.5
"""Seconds after which a new folder is looked through, and again: what was written before it was watched gave no event,
and what is still written gives one later.
"""

CHECK = 1.0
"""Seconds without an image after which the folder is looked for: of one that is gone no event comes any more."""

REMEMBERED = 10_000
"""The last images yielded: a folder is looked through while events come, too."""

State = Tuple[int, int]
"""Nanoseconds of a file's last change, and its size."""


class Watch:
    """Paths of the images that are written or moved into ``folder``, or a folder in it, from now on until ``stop``.

    A file counts once its writer has closed it, and again when it was written anew. Hidden files and folders and files
    without an image's suffix do not: programs that copy write to such first.

    Raises:
        UadtoolError: there is no such folder, or it cannot be watched; while it is iterated, the folder was removed, or
            another one took its place.
        MissingPackage: watchdog is not installed.
    """

    def __init__(self, folder: str) -> None:
        if not sys.platform.startswith("linux"):
            raise UadtoolError("following a folder needs Linux; pipe paths into: uadtool score MODEL -")
        if not Path(folder).is_dir():
            raise UadtoolError(f"{folder} is no folder to follow")
        events, observers = require("watchdog.events", "follow"), require("watchdog.observers.inotify", "follow")
        found: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()

        new_folders: "queue.SimpleQueue[Tuple[float, str, Dict[str, Optional[State]]]]" = queue.SimpleQueue()

        def look_through() -> None:
            while True:
                since, folder, before = new_folders.get()
                time.sleep(max(0.0, since + LOOK - time.monotonic()))
                now = {path: _state(path) for path in _files(folder)}
                if not before and now:
                    new_folders.put((time.monotonic(), folder, now))
                for path, state in before.items():
                    if state and state == now.get(path):
                        found.put(path)

        def appeared(path: str, is_folder: bool) -> None:
            if is_folder:
                new_folders.put((time.monotonic(), path, {}))
            else:
                found.put(path)

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc, name-defined]
            def on_closed(self, event: Any) -> None:
                found.put(event.src_path)

            def on_moved(self, event: Any) -> None:
                if event.dest_path:  # else it was moved away
                    appeared(event.dest_path, event.is_directory)

            def on_created(self, event: Any) -> None:
                if event.is_directory:
                    appeared(event.src_path, True)

        threading.Thread(target=look_through, daemon=True).start()
        self._found, self._folder = found, folder
        self._held = os.open(folder, os.O_RDONLY)  # so that no other folder can have its number
        self._observer = observers.InotifyObserver(generate_full_events=True)  # also of moves from elsewhere
        self._observer.schedule(Handler(), folder, recursive=True)
        try:
            self._observer.start()
        except OSError as error:  # the limit of inotify, say
            raise UadtoolError(f"cannot follow {folder}: {error.strerror}") from error

    def __iter__(self) -> Iterator[str]:
        known: Dict[str, State] = {}
        for path in iter(self._next, None):
            assert path is not None
            inside = Path(path).relative_to(self._folder)
            if inside.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in inside.parts):
                continue
            state = _state(path)
            if state is None or state == known.get(path):
                continue
            known.pop(path, None)
            known[path] = state  # the last one
            if len(known) > REMEMBERED:
                del known[next(iter(known))]
            yield path

    def _next(self) -> Optional[str]:
        while True:
            try:
                return self._found.get(timeout=CHECK)
            except queue.Empty:
                if not (self._is_there() and self._observer.is_alive()):
                    raise UadtoolError(f"{self._folder} was removed or replaced, and can be followed no longer; start "
                                       "again") from None

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._held), Path(self._folder).stat())
        except OSError:
            return False

    def stop(self) -> None:
        """End the iteration once what was found is yielded."""
        self._observer.stop()
        self._found.put(None)


def _files(folder: str) -> List[str]:
    """In it and the folders in it; of what is gone, none."""
    return sorted(str(Path(place, name)) for place, _, names in os.walk(folder) for name in names)


def _state(path: str) -> Optional[State]:
    """None if there is no such file, or none any more."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None
