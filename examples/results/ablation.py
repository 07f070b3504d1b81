"""Print the worth of each raw map of a trained detector, by itself and with others, as a Markdown table.

Of the method memory, also without the units of distances (whitening), and with one bank for all classes.

usage: python ablation.py DATA MODEL
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.images import read_masks
from uadtool.data.samples import Sample
from uadtool.host import available_cores, keep_freed_memory
from uadtool.lab.detectors import patch_memory
from uadtool.lab.detectors.memory import Memory
from uadtool.lab.detectors.statistics import fit_statistics
from uadtool.lab.models import load_float_model
from uadtool.lab.training.data import TeacherFeatures, image_batches, split_again
from uadtool.lab.training.loop import Run
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.pixel_metrics import count_pixels

NAMES: dict[str, Sequence[str]] = {
    "memory": ("stride 4", "stride 8", "stride 16"), "duet": ("stride 4", "stride 8", "stride 16", "head"),
    "stfpm": ("stride 4", "stride 8", "stride 16"),
    "rd": ("stride 4", "stride 8", "stride 16")}

Maps = tuple[Tensor, Tensor]
"""Raw maps [N, M, h, w] and indices of the nearest classes [N]."""


class Ablation:
    """A detector, the held-out images of its training, and the test images of a data set."""

    def __init__(self, data: str, model: str) -> None:
        self.detector, self.metadata = load_float_model(model)
        samples = training_samples(data, self.metadata.classes)
        self.training, self.held_out = split_again(self.metadata, samples)
        self.test = [sample for sample in scoring_samples([data]) if sample.class_name in self.metadata.classes]
        size = self.metadata.image_size
        self.masks = [np.zeros(size, bool) if sample.label == "good" else
                      read_masks(sample.masks, size) if sample.masks else None for sample in self.test]

    def maps(self, raw_maps: Callable[[Tensor], Maps], samples: Sequence[Sample]) -> Maps:
        parts = [raw_maps(images)
                 for _, images in image_batches(samples, self.metadata.reading, available_cores())]
        raw, nearest = zip(*parts)
        return torch.cat(raw), torch.cat(nearest)

    def rows(self, raw_maps: Callable[[Tensor], Maps], choices: Sequence[Sequence[int]]) -> list[list[str]]:
        """A row of figures for each of these choices of maps."""
        known, found = self.maps(raw_maps, self.held_out), self.maps(raw_maps, self.test)
        return [self._row(known, found, list(chosen)) for chosen in choices]

    def _row(self, known: Maps, found: Maps, chosen: list[int]) -> list[str]:
        detector, metadata = self.detector, self.metadata
        detector.expected_maps, detector.map_spreads = (
            known[0].new_zeros(len(metadata.classes), len(chosen), *detector.expected_maps.shape[2:]) for _ in range(2))

        def batches() -> Iterator[tuple[list[Sample], Tensor]]:
            yield self.held_out, known[0][:, chosen]

        fit_statistics(detector, lambda part: (part, known[1]), metadata.classes, batches())
        maps = detector.normalize_maps(found[0][:, chosen], found[1])
        evaluation = Evaluation()
        for sample, mask, score, one in zip(self.test, self.masks, detector.image_score(maps).tolist(), maps.numpy()):
            name = str(sample.class_name)
            evaluation.add(name, sample.label != "good", score, score, score > 0)
            if mask is not None:
                evaluation.add_pixels(name, count_pixels(upsample(one, metadata.image_size), mask))
        figures = evaluation.figures()
        auroc = figures["image_auroc"]
        overall = (auroc["mean"], auroc["pooled"],
                   *(figures.get(name, {}).get("mean") for name in ("pixel_auroc", "aupro")))
        return ["-" if value is None else f"{value:.3f}" for value in (
            *overall, *(auroc["per_class"][name] for name in metadata.classes))]

    def other_memory(self, one_bank: bool) -> Callable[[Tensor], Maps]:
        """Fill memories again; ``one_bank`` has the entries of all classes, and is searched whatever the class."""
        classes, options = len(self.metadata.classes), dict(self.metadata.options)
        if one_bank:
            options["entries"] *= classes
        memory = Memory(self.metadata.teacher, self.metadata.image_size, 1 if one_bank else classes, **options)
        memory.fold_batch_norm().teacher.load_state_dict(self.detector.teacher.state_dict())
        training = [replace(sample, class_name="any") for sample in self.training] if one_bank else self.training

        def teacher(images: Tensor) -> Sequence[Tensor]:
            return memory.features(memory.normalize(images))

        features = [TeacherFeatures(samples, self.metadata.reading, teacher, available_cores())
                    for samples in (training, self.held_out)]
        memory.fit(Run(*features, 0, 0, torch.device("cpu"), torch.float32, Path(), {}, False))

        def raw_maps(images: Tensor) -> Maps:
            pixels = self.detector.normalize(images)
            _, nearest = self.detector.raw_maps_and_class(images)
            row = torch.zeros_like(nearest) if one_bank else nearest
            return memory.raw_maps(pixels, memory.features(pixels), row), nearest

        return raw_maps


@torch.inference_mode()
def main(data: str, model: str) -> None:
    keep_freed_memory()
    ablation = Ablation(data, model)
    method, count = ablation.metadata.method, ablation.detector.expected_maps.shape[1]
    names = NAMES.get(method, ())
    if len(names) != count:  # another method, or shared stages
        names = [f"map {place}" for place in range(1, count + 1)]
    subsets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
    figures = ablation.rows(ablation.detector.raw_maps_and_class, subsets)
    rows = [[" + ".join(names[index] for index in chosen), *row] for chosen, row in zip(subsets, figures)]
    if method == "memory":
        rows += [["one bank for all classes", *row] for row in ablation.rows(ablation.other_memory(True), subsets[-1:])]
        patch_memory.APART = 1  # no image is set apart, and nothing is known of residuals
        rows += [["without whitening", *row] for row in ablation.rows(ablation.other_memory(False), subsets[-1:])]
    print(tabulate(rows, ["maps", "image AUROC", "pooled", "pixel AUROC", "AUPRO", *ablation.metadata.classes],
                   tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
