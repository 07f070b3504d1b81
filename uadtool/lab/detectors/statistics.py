"""What makes scores comparable across classes, and the threshold: all from good images, no label at run time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.data.dataset import Sample
from uadtool.files import list_digest
from uadtool.lab.detectors.contract import PATCH, Detector, standardize
from uadtool.lab.training import distributed
from uadtool.lab.training.data import TeacherFeatures, image_batches, split_again
from uadtool.metadata import Metadata
from uadtool.progress import Progress
from uadtool.scoring.thresholds import bounded_scores, threshold_at

PSEUDO_COUNT = 4
"""Weight, in images, of what is usual against what few images of a class or a position show."""
LEAST_SPREAD = 0.01
"""Of a class's maps and of a channel of descriptors, relative to the mean, and of scores: where all are alike."""
LEAST_UNIT = 0.1
"""Of a map, in spreads: where it is all but constant, as one of few int8 codes may be, and would drown the others."""

Batches = Iterable[tuple[Sequence[Sample], Tensor]]
"""Samples with their images, uint8 [N, H, W, 3] on the model's device."""
RawMaps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images, uint8 [N, H, W, 3] -> raw anomaly maps [N, M, h, w] and indices of the nearest classes, int64 [N]."""


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of a class's scores."""

    mean: float
    std: float


def class_statistics(scores: Sequence[Sequence[float]]) -> list[ScoreStatistics]:
    """Mean and standard deviation of each class's scores, from few images each.

    A class with 5 held-out images hardly knows its own spread. So the variance that is usual among the classes joins in
    as if it had been seen in ``PSEUDO_COUNT`` images (a scaled inverse chi-squared prior).
    """
    means = [float(np.mean(values)) for values in scores]
    squares = [float(np.sum(np.square(np.subtract(values, mean)))) for values, mean in zip(scores, means)]
    degrees = [len(values) - 1 for values in scores]
    usual = sum(squares) / sum(degrees) if sum(degrees) else 1.0
    return [ScoreStatistics(mean, max(LEAST_SPREAD, ((square + PSEUDO_COUNT * usual) / (n + PSEUDO_COUNT)) ** 0.5))
            for mean, square, n in zip(means, squares, degrees)]


@torch.inference_mode()
def fit_prototypes(detector: Detector, classes: Sequence[str], training: TeacherFeatures) -> None:
    """Set the prototypes of a deployed detector, in place: the mean descriptor of each class's training images.

    Args:
        classes: their names, in the order of the prototypes.
    """
    device = detector.prototypes.device
    descriptors = torch.cat([detector.raw_maps_and_descriptor(detector.normalize(images.to(device)))[1]
                             for images, _ in training.batches()])
    spreads = descriptors.std(dim=0, correction=0)
    # A channel that is dead on all of these images must not drown the others where it awakes.
    detector.descriptor_scale.copy_(1 / spreads.clamp(min=LEAST_SPREAD * spreads.mean() + 1e-6))
    for index, name in enumerate(classes):
        members = [place for place, sample in enumerate(training.samples) if sample.class_name == name]
        detector.prototypes[index] = descriptors[members].mean(dim=0)


@torch.inference_mode()
def fit_statistics(detector: Detector, raw_maps: RawMaps, classes: Sequence[str], held_out: Batches) -> list[float]:
    """Set map and score statistics of a detector, in place; returns the scores of the held-out images.

    The images that trained a detector tell little of what its maps show on others. And each held-out image is scored
    with what the others of its class show: else its own noise would be expected, and the threshold too low.

    Args:
        detector: one with prototypes.
        raw_maps: the detector's own ``raw_maps_and_class``, or that of what was made from it.
        classes: their names, in the order of the prototypes.
        held_out: good images of every class that trained nothing. Their maps must fit into memory.
    """
    owners, parts = [], []
    for samples, images in held_out:
        owners += [classes.index(str(sample.class_name)) for sample in samples]
        parts.append(raw_maps(images))
    maps, nearest = (torch.cat(part) for part in zip(*parts))
    patches = [F.avg_pool2d(values, PATCH, ceil_mode=True) for values in (maps, maps.square())]
    moments = torch.stack(patches, dim=1).double()
    members = [[place for place, owner in enumerate(owners) if owner == index] for index in range(len(classes))]
    sums = [moments[places].sum(0) for places in members]
    for index, places in enumerate(members):
        expected, spread = _map_statistics(sums[index], len(places))
        detector.expected_maps[index], detector.map_spreads[index] = expected, spread
    standard = detector.standardize_maps(maps, nearest)
    for place, (owner, found) in enumerate(zip(owners, nearest.tolist())):
        count = len(members[owner])
        if owner == found and count > 1:
            others = _map_statistics(sums[owner] - moments[place], count - 1)
            standard[place] = standardize(maps[place, None], *(values[None] for values in others))[0]
    units = _units(standard)
    detector.map_spreads.mul_(units)
    scores = detector.image_score((standard / units).sum(1))
    # An image that is taken for another class's tells nothing of what is usual in its own.
    right = [[place for place in places if nearest[place] == index] or places for index, places in enumerate(members)]
    statistics = class_statistics([scores[places].tolist() for places in right])
    mean, std = (scores.new_tensor(values) for values in zip(*statistics))
    detector.score_mean.copy_(mean)
    detector.score_std.copy_(std)
    normalised: list[float] = ((scores - mean[nearest]) / std[nearest]).tolist()
    return normalised


def _map_statistics(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and spread per patch, [M, h, w] each, from the sums [2, M, h, w] of so many maps and of their squares.

    Positions with few images lean on the mean over all positions, and half of a position's variance is that of the
    whole map: single positions know theirs badly, and a small one would turn noise into an alarm.
    """
    mean, square = sums / count
    variance = (square - mean.square()).clamp(min=0)
    level = mean.mean((1, 2), keepdim=True)
    expected = (count * mean + PSEUDO_COUNT * level) / (count + PSEUDO_COUNT)
    spread = ((variance + variance.mean((1, 2), keepdim=True)) / 2).sqrt()
    return expected.float(), spread.clamp(min=LEAST_SPREAD * level.abs() + 1e-6).float()


def _units(maps: Tensor) -> Tensor:
    """By what each of the standardised maps [N, M, h, w] counts in their sum: [M, 1, 1].

    From the median to what one good image in ten reaches, so that no map drowns the others with the tail of its noise.
    """
    median = maps.transpose(0, 1).flatten(1).median(1).values
    reached = maps.flatten(2).amax(2).quantile(0.9, dim=0)
    return (reached - median).clamp(min=LEAST_UNIT)[:, None, None]


def refit_statistics(detector: Detector, raw_maps: RawMaps, metadata: Metadata, samples: Sequence[Sample]) -> Metadata:
    """Take map and score statistics of a detector anew, in place, from the images that trained it.

    Returns the metadata with the new threshold and, in the last step of the provenance, what it is from.

    Args:
        raw_maps: of what was made from the detector.
        samples: what it was trained on, as ``dataset.training_samples`` gives it, wherever it lies now.

    Raises:
        ImageError: an image cannot be read.
    """
    _, held_out = split_again(metadata, samples)
    scores = fit_from_files(detector, raw_maps, metadata.classes, held_out, metadata.image_size, torch.device("cpu"))
    *before, last = metadata.provenance
    threshold = threshold_at(scores, metadata.false_positive_rate)
    return metadata.replace(threshold=threshold, good_scores=bounded_scores(scores), provenance=[*before, {
        **last, "statistics": {"images": list_digest(sample.path for sample in samples), "count": len(samples)}}])


def fit_from_files(detector: Detector, raw_maps: RawMaps, classes: Sequence[str], held_out: Sequence[Sample],
                    image_size: tuple[int, int], device: torch.device) -> list[float]:
    """``fit_statistics`` with images read from files, and progress."""
    with Progress("score statistics", len(held_out)) as progress:
        def batches() -> Iterator[tuple[Sequence[Sample], Tensor]]:
            for part, images in image_batches(held_out, image_size, distributed.own_cores()):
                yield part, images.to(device)
                progress.update(len(part))

        return fit_statistics(detector, raw_maps, classes, batches())
