"""What makes scores comparable across classes, and the threshold: all from good images, no label at run time."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from uadtool.detectors.stfpm import STFPM, describe
from uadtool.metadata import ScoreStatistics
from uadtool.training.data import TeacherFeatures

PSEUDO_COUNT = 4
"""Weight of the spread that is usual among the classes, in images, against a class's own spread."""
LEAST_VARIANCE = 1e-4
"""Of scores relative to their mean: what is taken as usual when the images of every class are alike."""


def class_statistics(scores: Mapping[str, Sequence[float]]) -> dict[str, ScoreStatistics]:
    """Mean and standard deviation of each class's raw scores, from few images each.

    A class with 5 held-out images hardly knows its own spread. So the relative variance that is usual among the
    classes joins in as if it had been seen in ``PSEUDO_COUNT`` images (a scaled inverse chi-squared prior).
    """
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    squares = {name: float(np.sum(np.square(np.subtract(values, means[name])))) for name, values in scores.items()}
    degrees = {name: len(values) - 1 for name, values in scores.items()}
    total = sum(degrees.values())
    usual = sum(squares[name] / means[name] ** 2 for name in scores) / total if total else 0.01
    usual = max(usual, LEAST_VARIANCE)
    return {
        name: ScoreStatistics(means[name], math.sqrt(
            (squares[name] + PSEUDO_COUNT * usual * means[name] ** 2) / (degrees[name] + PSEUDO_COUNT)))
        for name in scores
    }


def threshold_at(scores: Iterable[float], false_positive_rate: float) -> float:
    """The lowest of the scores that no more than this share of them exceeds.

    A rate below 1 / (number of scores) gives the highest one.
    """
    return float(np.quantile(list(scores), 1 - false_positive_rate, method="inverted_cdf"))


@torch.inference_mode()
def fit_normalization(detector: STFPM, classes: Sequence[str], training: TeacherFeatures, held_out: TeacherFeatures,
                      false_positive_rate: float) -> tuple[dict[str, ScoreStatistics], float]:
    """Set a trained detector's prototypes and score statistics, in place; returns the statistics and the threshold.

    Args:
        classes: their names, in the order of the prototypes.
        training: good images whose mean descriptors become the prototypes.
        held_out: good images of every class, for the statistics.
        false_positive_rate: share of the held-out images that may exceed the threshold.
    """
    device = detector.prototypes.device

    def of_class(data: TeacherFeatures, name: str) -> Tensor:
        return torch.tensor([sample.class_name == name for sample in data.samples], device=device)

    descriptors = torch.cat([describe([f.to(device).float() for f in features]) for _, features in training.batches()])
    detector.descriptor_scale.copy_(1 / descriptors.std(dim=0, correction=0).clamp(min=1e-6))
    for index, name in enumerate(classes):
        detector.prototypes[index] = descriptors[of_class(training, name)].mean(dim=0)

    results = [detector.raw_map_and_descriptor(detector.normalize(images.to(device)))
               for images, _ in held_out.batches()]
    scores = torch.cat([detector.image_score(raw) for raw, _ in results])
    statistics = class_statistics({name: scores[of_class(held_out, name)].tolist() for name in classes})
    detector.score_mean.copy_(torch.tensor([statistics[name].mean for name in classes]))
    detector.score_std.copy_(torch.tensor([statistics[name].std for name in classes]))
    nearest = detector.nearest_class(torch.cat([descriptor for _, descriptor in results]))
    normalized = (scores - detector.score_mean[nearest]) / detector.score_std[nearest]
    return statistics, threshold_at(normalized.tolist(), false_positive_rate)
