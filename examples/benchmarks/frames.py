"""Compare `uadtool score --frames` with `uadtool score` on the same JPEG and PNG images, in one run.

usage: python frames.py MODEL FOLDER [ROUNDS]

The two take turns. Each is a process, measured from its first image to its last: images per second, and processor time,
which depends less on what else the machine does. The frames come from memory. Requires Linux.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Sequence, Tuple

from uadtool.data.dataset import scoring_samples

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds; the unit of processor time."""


def measure(model: str, arguments: Sequence[str], frames: bytes = b"") -> Tuple[float, float]:
    """Images per second, and milliseconds of processor time for an image."""
    command = [sys.executable, "-m", "uadtool", "score", "-q", model, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        threading.Thread(target=lambda: (process.stdin.write(frames), process.stdin.close())).start()
        points = [(time.perf_counter(), _processor_seconds(process.pid)) for line in process.stdout
                  if b'"image"' in line]
    (began, before), (ended, after) = points[0], points[-1]
    used = max(TICK, after - before)  # of few images
    return (len(points) - 1) / (ended - began), 1000 * used / (len(points) - 1)


def _processor_seconds(process: int) -> float:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * TICK


def main(model: str, folder: str, rounds: int = 5) -> None:
    paths = [sample.path for sample in scoring_samples([folder])]
    frames = b"".join(Path(path).read_bytes() for path in paths)
    found = [(measure(model, [folder]), measure(model, ["--frames"], frames)) for _ in range(rounds)]
    for place, unit in enumerate(("images/s", "ms of processor time an image")):
        files, streamed = zip(*((one[place], other[place]) for one, other in found))
        shares = [after / before for before, after in zip(files, streamed)]
        print(f"files {statistics.median(files):.3g}, frames {statistics.median(streamed):.3g} {unit}: "
              f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
