"""After how many images the watch for drift raises an alarm, on the held-out images of a model.

usage: python drift.py MODEL.safetensors DATA

DATA is the data set that the model was trained on. Held-out images come in ten random orders; from the 101st on they
are brighter, darker, blurred or shifted, or defective test images come among them.
"""

import random
import sys
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageFilter
from tabulate import tabulate

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.samples import Sample
from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.models import load_model
from uadtool.lab.training.data import read_images, split_again
from uadtool.scoring.drift import Drift
from uadtool.terminal import log

BEFORE, ORDERS = 100, 10
Change = Callable[[np.ndarray], np.ndarray]


def blurred(radius: float) -> Change:
    return lambda pixels: np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def multiplied(factor: float) -> Change:
    return lambda pixels: (pixels * factor).clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    "unchanged": lambda pixels: pixels, "8 % brighter": multiplied(1.08), "8 % darker": multiplied(0.92),
    "blurred by 1 pixel": blurred(1), "blurred by 2 pixels": blurred(2),
    "shifted by 8 pixels": lambda pixels: np.roll(pixels, (8, 8), (0, 1))}


def main() -> None:
    log.setLevel("ERROR")
    model, metadata = load_model(sys.argv[1])
    _, held_out = split_again(metadata, training_samples(sys.argv[2], metadata.classes))
    defective = [sample for sample in scoring_samples([sys.argv[2]]) if sample.label == "anomalous"]

    def distances(samples: list[Sample], change: Change) -> Iterator[tuple[str, float]]:
        for start in range(0, len(samples), 16):
            images = read_images(samples[start:start + 16], metadata.reading, 1).numpy()
            with torch.inference_mode():
                output = OutputTensors(*model(torch.from_numpy(np.stack([change(image) for image in images]))))
            for place, distance in zip(output.nearest_class.tolist(), output.class_distance.tolist()):
                yield metadata.classes[place], distance

    def alarm(images: list[tuple[str, float]]) -> float:
        drift = Drift(metadata.classes, metadata.good_distances)
        return next((number - BEFORE for number, (name, distance) in enumerate(images)
                     if drift.add(str(number), name, distance)), float("inf"))

    def row(what: str, streams: list[list[tuple[str, float]]]) -> list[str]:
        found = [delay for delay in map(alarm, streams) if delay < float("inf")]
        return [what, f"{len(found)} of {len(streams)}",
                f"{median(found):.0f} ({min(found)} to {max(found)})" if found else "-"]

    usual = list(distances(held_out, CHANGES["unchanged"]))
    orders = [random.Random(seed).sample(range(len(usual)), len(usual)) for seed in range(ORDERS)]
    rows = []
    for what, change in CHANGES.items():
        changed = list(distances(held_out, change))
        rows.append(row(what, [[usual[number] for number in order[:BEFORE]]
                               + [changed[number] for number in order[BEFORE:] + order[:BEFORE]] for order in orders]))
    bad = list(distances(defective, CHANGES["unchanged"]))
    for share in (0.05, 0.1, 0.2, 0.3, 0.5):
        streams = []
        for seed, order in enumerate(orders):
            own, stream = random.Random(seed), [usual[number] for number in order[:BEFORE]]
            for number in order[BEFORE:] + order[:BEFORE]:
                while own.random() < share:
                    stream.append(own.choice(bad))
                stream.append(usual[number])
            streams.append(stream)
        rows.append(row(f"{share:.0%} defective", streams))
    print(tabulate(rows, ["images", "alarms", "images until then"], tablefmt="github"))


if __name__ == "__main__":
    main()
