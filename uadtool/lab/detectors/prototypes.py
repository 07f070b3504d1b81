"""The prototypes of classes, and how far from them images of a known class may be."""

from collections.abc import Sequence
from typing import Optional

import torch

from uadtool.lab.detectors.contract import EXAMPLE_COUNT, EXAMPLES, Detector, squared_distance
from uadtool.lab.detectors.statistics import LEAST_SPREAD, Known, class_statistics
from uadtool.lab.training.loop import Run

FARTHER = 1.25
"""Times the largest class distance of training images, an image of a known class may be far from its prototype.

Four models of three classes each (a fourth left out) called 99 to 100 % of the fourth class unknown, 0.6 % or less of
the good test images of their own classes, and 8 % or less of the defective ones.
"""
MOST_DISTANCES = 1000
"""Distances of a class that a model file holds at most."""
LEAST_FAR = 5.0
"""Least limit of class distances: few images do not show how far others may be."""


@torch.inference_mode()
def fit_prototypes(detector: Detector, classes: Sequence[str], run: Run, known: Optional[Known] = None
                   ) -> tuple[float, dict[str, list[float]]]:
    """Set the prototypes of a deployed detector, in place, to the mean descriptors of each class's training images.

    The statistics of distances are leave-one-out: an image is nearer to a mean that it is part of, by (n - 1) / n.
    Turned copies of images count only in the means.

    Args:
        classes: the class names, in the order of the prototypes.
        known: of the detector that these classes will be added to.

    Returns:
        The ``Metadata.class_distance_limit`` and the ``Metadata.good_distances``.
    """
    descriptors = detector.descriptors(run)
    spreads = descriptors.std(dim=0, correction=0)
    # A channel that is dead on the training images must not drown the others on images that activate it.
    scale = known.scale if known else 1 / spreads.clamp(min=LEAST_SPREAD * spreads.mean() + 1e-6)
    detector.descriptor_scale.copy_(scale)
    distances = []
    for index, name in enumerate(classes):
        members = [number for number, sample in enumerate(run.training.samples) if sample.class_name == name]
        detector.prototypes[index] = descriptors[members].mean(dim=0)
        detector.get_buffer(EXAMPLES)[index] = descriptors[
            [members[place * len(members) // EXAMPLE_COUNT] for place in range(EXAMPLE_COUNT)]]
        upright = [number for number in members if run.training.samples[number].turn == 0]
        inside = squared_distance(descriptors[upright], detector.prototypes[index], scale).sqrt()
        distances.append(inside * len(upright) / max(1, len(upright) - 1))
    good: dict[str, list[float]] = {}
    for index, (mean, std) in enumerate(class_statistics([values.tolist() for values in distances])):
        detector.distance_mean[index], detector.distance_std[index] = mean, std
        chosen = torch.randperm(len(distances[index]), generator=torch.Generator().manual_seed(run.seed))
        standardised = (distances[index].cpu()[chosen[:MOST_DISTANCES]] - mean) / std
        good[classes[index]] = [float(f"{distance:.6g}") for distance in standardised.sort().values.tolist()]
    farthest = max(FARTHER * float((values.max() - mean) / std) for values, mean, std in zip(
        distances, detector.distance_mean, detector.distance_std))
    return float(f"{max(farthest, LEAST_FAR):.6g}"), good
