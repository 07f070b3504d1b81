"""Text that is safe on a terminal: file names may hold any character, including control sequences."""

import logging

log = logging.getLogger("uadtool")
"""The logger of all modules; its messages go to stderr."""


def printable(text: str) -> str:
    r"""The text in one line, with control characters and bytes that are not text as ``\n``, ``\x1b`` and the like."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class OneLine(logging.Formatter):
    """Formats a message as one line, whatever names are in it; a traceback follows on its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
