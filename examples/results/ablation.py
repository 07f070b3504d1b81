"""Print the worth of each raw map of a trained detector, by itself and with others, as a Markdown table.

usage: python ablation.py DATA MODEL
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.images import read_masks, upsample
from uadtool.data.samples import Sample
from uadtool.host import available_cores, keep_freed_memory
from uadtool.lab.detectors.statistics import fit_statistics
from uadtool.lab.models import load_float_model
from uadtool.lab.training.data import image_batches, split_again
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.pixel_metrics import count_pixels

NAMES: dict[str, Sequence[str]] = {
    "memory": ("stride 4", "stride 8", "stride 16"), "duet": ("stride 4", "stride 8", "stride 16", "head"),
    "stfpm": ("stride 4", "stride 8", "stride 16"),
    "rd": ("stride 4", "stride 8", "stride 16")}


@torch.inference_mode()
def main(data: str, model: str) -> None:
    keep_freed_memory()
    detector, metadata = load_float_model(model)
    _, held_out = split_again(metadata, training_samples(data, metadata.classes))
    test = [sample for sample in scoring_samples([data]) if sample.class_name in metadata.classes]

    def maps(samples: list[Sample]) -> tuple[Tensor, Tensor]:
        parts = [detector.raw_maps_and_class(images)
                 for _, images in image_batches(samples, metadata.reading, available_cores())]
        raw, nearest = zip(*parts)
        return torch.cat(raw), torch.cat(nearest)

    known, (raw, nearest) = maps(held_out), maps(test)
    size = metadata.image_size
    masks = [np.zeros(size, bool) if sample.label == "good" else
             read_masks(sample.masks, size) if sample.masks else None for sample in test]

    def row(chosen: Sequence[int]) -> list[str]:
        detector.expected_maps, detector.map_spreads = (
            known[0].new_zeros(len(metadata.classes), len(chosen), *detector.expected_maps.shape[2:]) for _ in range(2))

        def batches() -> Iterator[tuple[list[Sample], Tensor]]:
            yield held_out, known[0][:, list(chosen)]

        fit_statistics(detector, lambda part: (part, known[1]), metadata.classes, batches())
        found = detector.normalize_maps(raw[:, list(chosen)], nearest)
        scores = detector.image_score(found).tolist()
        evaluation = Evaluation()
        for sample, mask, score, one in zip(test, masks, scores, found.numpy()):
            name = str(sample.class_name)
            evaluation.add(name, sample.label != "good", score, score, score > 0)
            if mask is not None:
                evaluation.add_pixels(name, count_pixels(upsample(one, size), mask))
        figures = evaluation.figures()
        auroc = figures["image_auroc"]
        overall = (auroc["mean"], auroc["pooled"],
                   *(figures.get(name, {}).get("mean") for name in ("pixel_auroc", "aupro")))
        return ["-" if value is None else f"{value:.3f}" for value in (
            *overall, *(auroc["per_class"][name] for name in metadata.classes))]

    names = NAMES.get(metadata.method, ())
    if len(names) != raw.shape[1]:  # another method, or shared stages
        names = [f"map {place}" for place in range(1, raw.shape[1] + 1)]
    subsets = [chosen for count in range(1, len(names) + 1) for chosen in combinations(range(len(names)), count)]
    rows = [[" + ".join(names[index] for index in chosen), *row(chosen)] for chosen in subsets]
    print(tabulate(rows, ["maps", "image AUROC", "pooled", "pixel AUROC", "AUPRO", *metadata.classes],
                   tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
