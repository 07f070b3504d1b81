"""Progress on stderr: a bar on a terminal, otherwise a log line now and then."""

import contextlib
import logging
import os
import sys
import time
from typing import Optional

from uadtool.terminal import log

BAR_WIDTH = 24
FIRST_BAR, NEXT_BAR, LINE = 0.5, 0.1, 20.0
"""Seconds until the bar is drawn, between two drawings, and between two log lines. A shorter run shows nothing."""


class Progress:
    """A context manager that counts the finished items of a ``task``.

    With ``total`` it shows the share and the time left. ``start`` items were done earlier, by an interrupted run; they
    count for the share but not for the rate. Silent if the ``uadtool`` logger ignores INFO messages.
    """

    def __init__(self, task: str, total: Optional[int] = None, start: int = 0) -> None:
        self.task, self.total = task, total
        self.start = self.count = start
        self.note = ""
        self._bar = log.isEnabledFor(logging.INFO) and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        self._next = self._began + (FIRST_BAR if self._bar else LINE)
        if self._bar:
            log.addFilter(self._make_room)
        return self

    def update(self, count: int = 1, note: str = "") -> None:
        """Count more items; ``note`` stays at the end of the bar until the next note."""
        self.count += count
        self.note = note or self.note
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (NEXT_BAR if self._bar else LINE)
            self._show()

    def __exit__(self, *_: object) -> None:
        log.removeFilter(self._make_room)
        if self._shown:
            self._show()
            if self._bar:
                _draw("\n")

    def _show(self) -> None:
        self._shown = True
        if self._bar:
            _draw("\r{}\x1b[K", self._text())
        else:
            log.info("%s", self._text())

    def _make_room(self, record: logging.LogRecord) -> bool:
        """Clear the bar for a log message; it is drawn again below the message."""
        if self._shown:
            _draw("\r\x1b[K")
        return True

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        rate = (self.count - self.start) / seconds if seconds else 0.0
        if self.total is None:
            parts = [f"{self.task}: {self.count}"]
        else:
            percent = min(100, 100 * self.count // self.total) if self.total else 100
            filled = BAR_WIDTH * percent // 100
            picture = f" [{'#' * filled}{'.' * (BAR_WIDTH - filled)}]" if self._bar else ""
            parts = [f"{self.task}:{picture} {self.count} of {self.total} ({percent} %)"]
        parts.append((f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}") + " per second")
        if self.total is not None and self.count < self.total and rate:
            parts.append(f"{_clock((self.total - self.count) / rate)} left")
        else:
            parts.append(_clock(seconds))
        return ", ".join([*parts, self.note] if self.note else parts)


def _draw(layout: str, text: str = "") -> None:
    """Print on the terminal, cut to its width; a closed terminal is ignored."""
    with contextlib.suppress(OSError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        print(layout.format(text[:columns - 1]), end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
