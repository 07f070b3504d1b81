"""Text that is safe on a terminal: file names may hold any character, including control sequences."""

import logging
from typing import Sequence

log = logging.getLogger("uadtool")
"""The logger of all modules; its messages go to stderr."""
MOST_NAMED = 5
"""Names that a message lists."""


def printable(text: str) -> str:
    r"""The text in one line, with control characters and bytes that are not text as ``\n``, ``\x1b`` and the like."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def first_of(names: Sequence[str], kind: str) -> str:
    """The first names in a list, and how many more of a ``kind`` (plural) there are."""
    more = f" and {len(names) - MOST_NAMED} more {kind}" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class OneLine(logging.Formatter):
    """Formats a message as one line, whatever names are in it; a traceback follows on its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
