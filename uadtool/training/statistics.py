"""What makes scores comparable across classes, and the threshold: all from good images, no label at run time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.dataset import Sample
from uadtool.detectors.base import PATCH, Detector
from uadtool.training.data import TeacherFeatures

PSEUDO_COUNT = 4
"""Weight, in images, of what is usual against what few images of a class or a position show."""
LEAST_SPREAD = 0.01
"""Of a class's maps, relative to their mean, and of its scores: where all images are alike."""

Batches = Iterable[tuple[Sequence[Sample], Tensor]]
"""Samples with their images, uint8 [N, H, W, 3] on the model's device."""
RawMaps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images, uint8 [N, H, W, 3] -> raw anomaly maps [N, h, w] and indices of the nearest classes, int64 [N]."""


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of a class's scores."""

    mean: float
    std: float


def class_statistics(scores: Mapping[str, Sequence[float]]) -> dict[str, ScoreStatistics]:
    """Mean and standard deviation of each class's scores, from few images each.

    A class with 5 held-out images hardly knows its own spread. So the variance that is usual among the classes joins in
    as if it had been seen in ``PSEUDO_COUNT`` images (a scaled inverse chi-squared prior).
    """
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    squares = {name: float(np.sum(np.square(np.subtract(values, means[name])))) for name, values in scores.items()}
    degrees = {name: len(values) - 1 for name, values in scores.items()}
    total = sum(degrees.values())
    usual = sum(squares.values()) / total if total else 1.0
    return {name: ScoreStatistics(means[name], max(LEAST_SPREAD, (
                (squares[name] + PSEUDO_COUNT * usual) / (degrees[name] + PSEUDO_COUNT)) ** 0.5))
            for name in scores}


def threshold_at(scores: Iterable[float], false_positive_rate: float) -> float:
    """The lowest of the scores that no more than this share of them exceeds.

    A rate below 1 / (number of scores) gives the highest one.
    """
    return float(np.quantile(list(scores), 1 - false_positive_rate, method="inverted_cdf"))


@torch.inference_mode()
def fit_prototypes(detector: Detector, classes: Sequence[str], training: TeacherFeatures) -> None:
    """Set the prototypes of a deployed detector, in place: the mean descriptor of each class's training images.

    Args:
        classes: their names, in the order of the prototypes.
    """
    device = detector.prototypes.device
    descriptors = torch.cat([detector.raw_map_and_descriptor(detector.normalize(images.to(device)))[1]
                             for images, _ in training.batches()])
    detector.descriptor_scale.copy_(1 / descriptors.std(dim=0, correction=0).clamp(min=1e-6))
    for index, name in enumerate(classes):
        members = [place for place, sample in enumerate(training.samples) if sample.class_name == name]
        detector.prototypes[index] = descriptors[members].mean(dim=0)


@torch.inference_mode()
def fit_statistics(detector: Detector, raw_maps: RawMaps, classes: Sequence[str], training: Batches, held_out: Batches,
                   false_positive_rate: float) -> float:
    """Set map and score statistics of a detector, in place; returns the threshold.

    Args:
        detector: one with prototypes.
        raw_maps: the detector's own ``raw_map_and_class``, or that of what was made from it.
        classes: their names, in the order of the prototypes.
        training: good images of every class that tell what a map shows where.
        held_out: others, whose scores tell how far good ones go, and of which the ``false_positive_rate`` may exceed
            the threshold.
    """
    detector.reset_statistics()
    expected, spread = _map_statistics(raw_maps, classes, training)
    detector.expected_map.copy_(expected)
    detector.map_spread.copy_(spread)
    names, results = [], []
    for samples, images in held_out:
        names += [sample.class_name for sample in samples]
        raw, nearest = raw_maps(images)
        results.append((detector.image_score(detector.normalize_map(raw, nearest)), nearest))
    scores, nearest = (torch.cat(parts) for parts in zip(*results))
    # An image that is taken for another class's tells nothing of what is usual in its own.
    found = [classes[index] for index in nearest.tolist()]
    by_class = {name: [score for score, n, f in zip(scores.tolist(), names, found) if n == name == f]
                or [score for score, n in zip(scores.tolist(), names) if n == name] for name in classes}
    statistics = class_statistics(by_class)
    mean, std = (scores.new_tensor(values) for values in zip(*(statistics[name] for name in classes)))
    detector.score_mean.copy_(mean)
    detector.score_std.copy_(std)
    return threshold_at(((scores - mean[nearest]) / std[nearest]).tolist(), false_positive_rate)


def _map_statistics(raw_maps: RawMaps, classes: Sequence[str], batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean and spread of each class's maps per patch: two of [classes, h, w].

    Positions with few images lean on the mean over all positions, and half of a position's variance is that of the
    whole map: single positions know theirs badly, and a small one would turn noise into an alarm.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(classes, 0)
    for samples, images in batches:
        maps, _ = raw_maps(images)
        moments = F.avg_pool2d(torch.stack([maps, maps.square()], dim=1), PATCH).double()
        for sample, moment in zip(samples, moments):
            name = str(sample.class_name)
            sums[name] = sums.get(name, 0) + moment
            counts[name] += 1
    means, spreads = [], []
    for name in classes:
        mean, square = sums[name] / counts[name]
        variance = (square - mean.square()).clamp(min=0)
        level = mean.mean()
        means.append((counts[name] * mean + PSEUDO_COUNT * level) / (counts[name] + PSEUDO_COUNT))
        spreads.append(((variance + variance.mean()) / 2).sqrt().clamp(min=LEAST_SPREAD * level.abs() + 1e-6))
    return torch.stack(means).float(), torch.stack(spreads).float()
