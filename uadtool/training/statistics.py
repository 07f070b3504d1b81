"""What makes scores comparable across classes, and the threshold: all from good images, no label at run time."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from uadtool.dataset import Sample
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
def fit_prototypes(detector: STFPM, classes: Sequence[str], training: TeacherFeatures) -> None:
    """Set the detector's prototypes, in place: the mean descriptor of each class's training images.

    Args:
        classes: their names, in the order of the prototypes.
    """
    device = detector.prototypes.device
    descriptors = torch.cat([describe([f.to(device).float() for f in features]) for _, features in training.batches()])
    detector.descriptor_scale.copy_(1 / descriptors.std(dim=0, correction=0).clamp(min=1e-6))
    for index, name in enumerate(classes):
        members = [place for place, sample in enumerate(training.samples) if sample.class_name == name]
        detector.prototypes[index] = descriptors[members].mean(dim=0)


@torch.inference_mode()
def fit_statistics(model: nn.Module, classes: Sequence[str], batches: Iterable[tuple[Sequence[Sample], Tensor]],
                   false_positive_rate: float) -> tuple[dict[str, ScoreStatistics], float]:
    """Set the score statistics of a detector, float or quantized, in place; returns them and the threshold.

    Args:
        model: a ``Detector`` with prototypes, or the quantized graph of one.
        classes: their names, in the order of the prototypes.
        batches: held-out good images of every class, uint8 [N, H, W, 3] on the model's device, with their samples.
        false_positive_rate: share of these images that may exceed the threshold.
    """
    mean, std = model.get_buffer("score_mean"), model.get_buffer("score_std")
    names, results = [], []
    for samples, images in batches:
        names += [sample.class_name for sample in samples]
        score, _, nearest = model(images)
        results.append((score * std[nearest] + mean[nearest], nearest))
    raw, nearest = (torch.cat(parts) for parts in zip(*results))
    statistics = class_statistics({name: raw[[n == name for n in names]].tolist() for name in classes})
    mean.copy_(torch.tensor([statistics[name].mean for name in classes]))
    std.copy_(torch.tensor([statistics[name].std for name in classes]))
    return statistics, threshold_at(((raw - mean[nearest]) / std[nearest]).tolist(), false_positive_rate)
