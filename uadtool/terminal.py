"""What may be written to a terminal: names in files and of files hold any character, and terminals obey some."""

import logging


def printable(text: str) -> str:
    r"""The text in one line, with control and formatting characters, and bytes that are no text, as ``\n`` or ``\x1b``.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class OneLine(logging.Formatter):
    """A message is one line, whatever the names in it are; a traceback follows in lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
