"""Measure the memory of calibration: peak resident MiB of a process per method and number of images, in batches of 16.

usage: python calibration_memory.py MODEL.safetensors DATA

If DATA has too few good training images, they are repeated.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice, repeat
from multiprocessing import get_context

METHODS = ["minmax", "moving-average", "percentile", "entropy", "mse"]
COUNTS = [16, 64, 256, 1024]
BATCH = 16


def peak_memory(model: str, data: str, method: str, count: int) -> float:
    # imported here, because a forked process starts with the peak of its parent
    import resource

    from uadtool.data.dataset import training_samples
    from uadtool.lab.models import load_float_model
    from uadtool.lab.quantization.calibration import calibrate
    from uadtool.lab.quantization.plan import QuantizationPlan
    from uadtool.lab.training.data import image_batches

    detector, metadata = load_float_model(model)
    samples = cycle(training_samples(data))
    parts = (list(islice(samples, BATCH)) for _ in range(count // BATCH))
    batches = (images for part in parts for _, images in image_batches(part, metadata.reading, 1))
    calibrate(QuantizationPlan(detector), batches, method)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def main(model: str, data: str) -> None:
    print("method".ljust(16), *(f"{count:>6}" for count in COUNTS))
    # a fresh process each, because the peak of one run would hide the peak of the next
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for method in METHODS:
            peaks = processes.map(peak_memory, repeat(model), repeat(data), repeat(method), COUNTS)
            print(method.ljust(16), *(f"{peak:6.0f}" for peak in peaks), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
