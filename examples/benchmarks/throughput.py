"""Compare `uadtool score` with the slower of its two stages, each measured by itself: images per second, in one run.

usage: python throughput.py MODEL FOLDER [ROUNDS]

The stages and `score` take turns. `decode` reads and resizes on all cores. `inference` runs decoded images one after
the other, each on all cores. `score` is a process, timed from its first image to its last. The last line has the shares
of that time: decoding, inference as in `score` (`streams`: an image on each core), and the rest.
"""

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np

from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image
from uadtool.data.read_ahead import read_ahead
from uadtool.host import available_cores
from uadtool.runtimes.opening import open_model


def main(model: str, folder: str, rounds: int = 5) -> None:
    paths = [sample.path for sample in scoring_samples([folder])]
    runtime, streams = open_model(model), open_model(model, streams=available_cores())
    reading = runtime.metadata.reading
    images = [read_image(path, *reading)[None] for path in paths[:200]]
    readers = available_cores()
    rates = defaultdict(list)
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in read_ahead(lambda path: read_image(path, *reading), paths, readers, 2 * readers):
            pass
        rates["decode"].append(len(paths) / (time.perf_counter() - began))
        began = time.perf_counter()
        for image in images:
            runtime.run(image)
        rates["inference"].append(len(images) / (time.perf_counter() - began))
        began = time.perf_counter()
        for _ in read_ahead(streams.run, images, readers, 2 * readers):
            pass
        rates["streams"].append(len(images) / (time.perf_counter() - began))
        rates["score"].append(score_rate(model, folder))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:10} {medians[name]:7.1f} images/s   ({min(values):.1f} to {max(values):.1f})")
    slower = np.minimum(rates["decode"], rates["inference"])
    shares = np.array(rates["score"]) / slower
    print(f"score reaches {100 * np.median(shares):.0f} % of the slower stage "
          f"({100 * shares.min():.0f} to {100 * shares.max():.0f} %)")
    decode, inference = (medians["score"] / medians[stage] for stage in ("decode", "streams"))
    print(f"of its time decode takes {decode:.0%}, inference {inference:.0%}, the rest {1 - decode - inference:.0%}")


def score_rate(model: str, folder: str) -> float:
    """Images per second from the first image to the last."""
    command = [sys.executable, "-m", "uadtool", "score", "-q", model, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        times = [time.perf_counter() for line in process.stdout if json.loads(line)["type"] == "image"]
    return (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
