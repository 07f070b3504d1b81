"""Images that appear in a folder, each as soon as it is whole. On Linux, whose kernel tells when a file is closed."""

import queue
import sys
import threading
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

from uadtool.dataset import SUFFIXES
from uadtool.errors import UadtoolError, require

FIRST_LOOK = 0.5
"""Seconds after which a new folder is looked through: what was written before it was watched gave no event."""


class Watch:
    """Paths of the images that are written or moved into ``folder``, or a folder in it, from now on until ``stop``.

    A file counts once its writer has closed it, and again when it was written anew. Hidden files and those without an
    image's suffix do not: programs that copy write to such first.

    Raises:
        UadtoolError: there is no such folder, or it cannot be watched.
        MissingPackage: watchdog is not installed.
    """

    def __init__(self, folder: str) -> None:
        if not sys.platform.startswith("linux"):
            raise UadtoolError("following a folder needs Linux; pipe paths into: uadtool score MODEL -")
        if not Path(folder).is_dir():
            raise UadtoolError(f"{folder} is no folder to follow")
        events, observers = require("watchdog.events", "follow"), require("watchdog.observers.inotify", "follow")
        found: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()

        def look_through(new_folder: str) -> None:
            for path in sorted(Path(new_folder).rglob("*")):
                if path.is_file():
                    found.put(str(path))

        def appeared(path: str, is_folder: bool) -> None:
            if is_folder:
                timer = threading.Timer(FIRST_LOOK, look_through, [path])
                timer.daemon = True
                timer.start()
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

        self._found = found
        self._observer = observers.InotifyObserver(generate_full_events=True)  # also of moves from elsewhere
        self._observer.schedule(Handler(), folder, recursive=True)
        try:
            self._observer.start()
        except OSError as error:  # the limit of inotify, say
            raise UadtoolError(f"cannot follow {folder}: {error.strerror}") from error

    def __iter__(self) -> Iterator[str]:
        last: Optional[Tuple[str, int, int]] = None
        for path in iter(self._found.get, None):
            assert path is not None
            if Path(path).suffix.lower() not in SUFFIXES or Path(path).name.startswith("."):
                continue
            try:
                status = Path(path).stat()
            except OSError:  # gone again
                continue
            this = path, status.st_mtime_ns, status.st_size
            if this != last:  # a folder is looked through while events come, too
                last = this
                yield path

    def stop(self) -> None:
        """End the iteration once what was found is yielded."""
        self._observer.stop()
        self._found.put(None)
