"""Images that appear in a folder, each as soon as it is whole."""

import queue
from pathlib import Path
from typing import Any, Iterator, Optional

from uadtool.dataset import SUFFIXES
from uadtool.errors import UadtoolError, require


class Watch:
    """Paths of the images that are written or moved into ``folder``, or a folder in it, from now on until ``stop``.

    A file counts once its writer has closed it. Hidden files and those without an image's suffix do not: programs that
    copy write to such first.

    Raises:
        UadtoolError: there is no such folder, or it cannot be watched.
        MissingPackage: watchdog is not installed.
    """

    def __init__(self, folder: str) -> None:
        events, observers = require("watchdog.events", "follow"), require("watchdog.observers", "follow")
        if not Path(folder).is_dir():
            raise UadtoolError(f"{folder} is no folder to follow")
        found: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()

        class Handler(events.FileSystemEventHandler):  # type: ignore[misc, name-defined]
            def on_closed(self, event: Any) -> None:
                found.put(event.src_path)

            def on_moved(self, event: Any) -> None:
                if not event.is_directory:
                    found.put(event.dest_path)

        self._found = found
        self._observer = observers.Observer()
        self._observer.schedule(Handler(), folder, recursive=True)
        try:
            self._observer.start()
        except OSError as error:  # the limit of inotify, say
            raise UadtoolError(f"cannot follow {folder}: {error.strerror}") from error

    def __iter__(self) -> Iterator[str]:
        for path in iter(self._found.get, None):
            assert path is not None
            if Path(path).suffix.lower() in SUFFIXES and not Path(path).name.startswith("."):
                yield path

    def stop(self) -> None:
        """End the iteration once what was found is yielded."""
        self._observer.stop()
        self._found.put(None)
