"""Does memory stay while one process scores more and more images? Resident memory after so many of them.

usage: python scoring_memory.py MODEL IMAGE...       an .onnx file, or an engine
"""

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO

STOPS = (50, 100, 200, 500, 1000, 2000)


def feed(stdin: TextIO, images: list[str]) -> None:
    """All of the images, again and again."""
    stdin.writelines(f"{path}\n" for path in itertools.islice(itertools.cycle(images), STOPS[-1]))
    stdin.close()


def main(model: str, images: list[str]) -> None:
    command = [sys.executable, "-m", "uadtool", "score", model, "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        threading.Thread(target=feed, args=(process.stdin, images), daemon=True).start()
        print("images  resident MiB")
        process.stdout.readline()  # about the run
        for count, _ in enumerate(process.stdout, 1):
            if count in STOPS:
                status = Path(f"/proc/{process.pid}/status").read_text()
                print(f"{count:6} {int(status.partition('VmRSS:')[2].split()[0]) / 1024:13.1f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 2 else sys.exit(__doc__)
