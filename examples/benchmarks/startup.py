"""Measure how long uadtool takes to start: seconds, median of ROUNDS (12) in which each command runs once.

usage: python startup.py MODEL.onnx IMAGE [ROUNDS]
"""

import statistics
import subprocess
import sys
import time


def main(model: str, image: str, rounds: int = 12) -> None:
    python, uadtool = [sys.executable, "-c"], [sys.executable, "-m", "uadtool"]
    commands = {
        "import click": [*python, "import click"],
        "uadtool --help": [*uadtool, "--help"],
        "import numpy, onnxruntime": [*python, "import numpy, onnxruntime"],
        "uadtool score MODEL IMAGE": [*uadtool, "score", model, image],
    }
    seconds = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    for name, measured in seconds.items():
        print(f"{statistics.median(measured):.3f}  {name}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
