import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from uadtool import progress
from uadtool.progress import Progress

PROGRAM = """
import logging, sys, time
logging.basicConfig(format="uadtool: %(message)s", level=sys.argv[1])
from uadtool import progress
progress.FIRST_BAR = progress.NEXT_BAR = 0
with progress.Progress("train", total=4, start=1) as bar:
    bar.update(note="loss 0.5")
    logging.getLogger("uadtool").warning("careful")
    bar.update(2)
"""


def on_terminal(level: str, columns: int = 100, term: str = "xterm") -> str:
    """What PROGRAM writes on a terminal."""
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        subprocess.run([sys.executable, "-c", PROGRAM, level], stderr=other_end, check=True, timeout=60,
                       env={**os.environ, "TERM": term})
        return os.read(terminal, 1 << 16).decode()
    finally:
        os.close(other_end)
        os.close(terminal)


def test_a_bar_on_a_terminal():
    _, first, message, *_, last, end = on_terminal("INFO").replace("\r\n", "\r").split("\r")
    assert first.startswith("train: [############............] 2 of 4 (50 %), ")
    assert first.endswith(" left, loss 0.5\x1b[K")
    assert message == "\x1b[Kuadtool: careful"  # in place of the bar
    assert last.startswith("train: [########################] 4 of 4 (100 %), ")
    assert end == ""


def test_the_bar_stays_on_its_line():
    drawn = [part.replace("\x1b[K", "") for part in on_terminal("INFO", columns=30).split("\r")]
    assert max(map(len, drawn)) == 29


@pytest.mark.parametrize(("level", "term"), [("WARNING", "xterm"), ("INFO", "dumb")])
def test_no_bar(level, term):
    assert on_terminal(level, term=term) == "uadtool: careful\r\n"


def test_lines_elsewhere(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "uadtool")
    with Progress("score") as quick:
        quick.update(5)
    assert not caplog.messages  # over before the first line
    monkeypatch.setattr(progress, "LINE", 0.0)
    with Progress("score", total=3) as counted:
        time.sleep(0.01)
        counted.update(note="first")
        counted.update(2)
    with Progress("read") as uncounted:
        uncounted.update()
    with Progress("train", total=1000) as nearly:
        nearly.update(999)
        assert " (99 %), " in caplog.messages[-1]
    first, second, end, uncounted_line, *_ = caplog.messages
    assert first.startswith("score: 1 of 3 (33 %), ")
    assert first.endswith(" left, first")
    assert second.startswith("score: 3 of 3 (100 %), ")
    assert end.startswith("score: 3 of 3 (100 %), ")
    assert uncounted_line.startswith("read: 1, ")


def test_work_done_earlier_counts_for_the_share_only(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "uadtool")
    monkeypatch.setattr(progress, "LINE", 0.0)
    with Progress("train", total=200_000, start=100_000) as resumed:
        time.sleep(0.1)
        resumed.update(1)
    assert caplog.messages[0].startswith("train: 100001 of 200000 (50 %), ")
    rate = float(caplog.messages[0].split("), ")[1].split()[0])
    assert rate <= 10


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.7, "1:00:00"), (7262, "2:01:02")])
def test_clock(seconds, text):
    assert progress._clock(seconds) == text
