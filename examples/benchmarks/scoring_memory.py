"""Measure whether memory grows while one process scores many images: resident memory and rate at several counts.

usage: python scoring_memory.py MODEL COUNT [--frames] IMAGE...       MODEL is an .onnx file, or an engine

The images are scored repeatedly, COUNT in all: as paths on stdin, or as frames.
"""

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

STOPS = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def feed(stdin: BinaryIO, images: list[bytes], count: int) -> None:
    stdin.writelines(itertools.islice(itertools.cycle(images), count))
    stdin.close()


def main(model: str, count: int, images: list[str]) -> None:
    frames = images[0] == "--frames"
    lines = [Path(path).read_bytes() for path in images[1:]] if frames else [f"{path}\n".encode() for path in images]
    command = [sys.executable, "-m", "uadtool", "score", "-q", model, "--frames" if frames else "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        threading.Thread(target=feed, args=(process.stdin, lines, count), daemon=True).start()
        print("images  resident MiB  images/s")
        process.stdout.readline()  # the run record
        began = time.perf_counter()
        for number, _ in enumerate(process.stdout, 1):
            if number in STOPS:
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
                print(f"{number:6} {resident:13.1f} {number / (time.perf_counter() - began):9.1f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
