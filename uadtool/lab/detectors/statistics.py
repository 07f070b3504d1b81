"""The statistics of good images that make maps and scores comparable across classes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uadtool.data.samples import Sample, tail_digest
from uadtool.files import list_digest
from uadtool.lab.detectors.contract import PATCH, Detector, standardize, within
from uadtool.lab.training import distributed
from uadtool.lab.training.data import image_batches, split_again
from uadtool.metadata import Metadata, Reading
from uadtool.progress import Progress
from uadtool.scoring.anomaly_maps import OUTSIDE
from uadtool.scoring.thresholds import with_thresholds

PSEUDO_COUNT = 4
"""Weight, in images, of the average over classes or positions against the few images of one class or position."""
LEAST_SPREAD = 0.01
"""Lower limit of the spread of scores and, relative to the mean, of maps and of channels of descriptors."""
ROUNDING = 0.001
"""Identical images have a spread of scores below this: rounding."""
LEAST_UNIT = 0.1
"""Lower limit of the unit of a map, in spreads. Without it a map that is nearly constant would drown the others."""
CONSPICUOUS = 6.0
"""Standard deviations of the others' scores, above their mean, from which a held-out image is worth a look. Of the
seven classes of the shop-floor set the highest had 4.7 with the method memory."""
MOST_NAMED = 10_000
"""Held-out images up to which a model file names each."""

Batches = Iterable[tuple[Sequence[Sample], Tensor]]
"""Batches of samples with their images, uint8 [N, H, W, 3] on the model's device."""
RawMaps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images, uint8 [N, H, W, 3] -> raw anomaly maps [N, M, h, w] and indices of the nearest classes, int64 [N]."""


class ScoreStatistics(NamedTuple):
    """Mean and standard deviation of a class's scores."""

    mean: float
    std: float


class Known(NamedTuple):
    """What a detector measures in, when classes are added to it."""

    scale: Tensor
    """``descriptor_scale``."""
    units: Tensor
    """Of the raw maps in their sum, [M, 1, 1]."""
    variance: float
    """Mean over its classes of the variance of scores."""


class HeldOut(NamedTuple):
    """What held-out good images showed.

    ``scores`` are those by class, and under ``""`` of images that are taken for another class. The highest of a class
    counts as at least 1, one standard deviation. ``taken_for`` counts the images by class and nearest class.
    ``conspicuous`` are the paths of images that score far above the others of their class: defects, perhaps.
    ``units`` are the ``Metadata.map_units``, and ``named`` is the ``Metadata.held_out``.
    """

    scores: dict[str, list[float]]
    taken_for: Counter[tuple[str, str]]
    conspicuous: list[str]
    units: list[float]
    named: dict[str, dict[str, float]]


def class_statistics(scores: Sequence[Sequence[float]], known: Optional[Known] = None) -> list[ScoreStatistics]:
    """Mean and standard deviation of each class's scores, from few images each.

    Five held-out images hardly determine a spread. Therefore the mean variance of all classes counts as if it had been
    seen in ``PSEUDO_COUNT`` more images (a scaled inverse chi-squared prior): that of the ``known`` classes, if there
    are any. Single or identical images determine no spread, and the variance counts as 1.
    """
    means = [float(np.mean(values)) for values in scores]
    squares = [float(np.sum(np.square(np.subtract(values, mean)))) for values, mean in zip(scores, means)]
    degrees = [len(values) - 1 for values in scores]
    prior = known.variance if known else sum(squares) / max(1, sum(degrees))
    if prior < ROUNDING**2:  # it differs among runtimes, so it must not count as a spread
        prior = 1.0
    return [ScoreStatistics(mean, max(LEAST_SPREAD, ((square + PSEUDO_COUNT * prior) / (n + PSEUDO_COUNT)) ** 0.5))
            for mean, square, n in zip(means, squares, degrees)]


def conspicuous(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    """For each class the places of scores above ``CONSPICUOUS``, in the ``class_statistics`` of all other scores."""
    arrays = [np.array(values) for values in scores]
    squares = [np.square(values - values.mean()).sum() for values in arrays]
    degrees = sum(map(len, arrays)) - len(arrays)
    found: list[list[int]] = []
    for values, square in zip(arrays, squares):
        n = max(2, len(values))  # a single one is its own mean
        mean = (values.sum() - values) / (n - 1) if len(values) > 1 else values
        share = np.square(values - values.mean()) * n / (n - 1)  # of the sum of squares
        prior = (sum(squares) - share) / max(1, degrees - 1)
        prior[prior < ROUNDING**2] = 1
        std = np.sqrt((square - share + PSEUDO_COUNT * prior) / (n - 2 + PSEUDO_COUNT))
        found.append(np.flatnonzero(values > mean + CONSPICUOUS * std).tolist())
    return found


@torch.inference_mode()
def fit_statistics(detector: Detector, raw_maps: RawMaps, classes: Sequence[str], held_out: Batches,
                   known: Optional[Known] = None) -> HeldOut:
    """Set the map and score statistics of a detector, in place.

    Training images understate the spread, so held-out images are used. Each is scored leave-one-out, because its own
    contribution to the statistics would lower its score, and thus the threshold.

    Args:
        detector: a detector with prototypes.
        raw_maps: the detector's own ``raw_maps_and_class``, or the corresponding function of its quantized graph.
        classes: the class names, in the order of the prototypes.
        held_out: good images that were not trained on. Their maps must fit into memory five times.
        known: of the detector that these classes are added to, which keeps the statistics of its own classes; otherwise
            there must be images of every class.
    """
    owners, batches, paths = [], [], list[str]()
    for samples, images in held_out:
        paths += [sample.path for sample in samples]
        owners += [classes.index(str(sample.class_name)) for sample in samples]
        maps, nearest = raw_maps(images)
        batches.append((maps, nearest, _moments(maps, detector.roi[owners[-len(samples):]])))
    maps, nearest, moments = (torch.cat(tensors) for tensors in zip(*batches))
    del batches
    # The maps and scores of an image that is taken for another class say nothing about its own.
    everyone = [[number for number, owner in enumerate(owners) if owner == index] for index in range(len(classes))]
    members = [[number for number in numbers if nearest[number] == index] or numbers
               for index, numbers in enumerate(everyone)]
    sums = [moments[numbers].sum(0) for numbers in members]
    inside = F.max_pool2d(detector.roi.float(), PATCH, ceil_mode=True) > 0
    present = sorted(set(owners))
    for index in present:
        numbers = members[index]
        detector.expected_maps[index], detector.map_spreads[index] = _map_statistics(
            sums[index], len(numbers), inside[index])
    for number, (owner, nearest_class) in enumerate(zip(owners, nearest.tolist())):
        count = len(members[owner])
        if owner == nearest_class and count > 1:
            expected, spread = _map_statistics(sums[owner], count, inside[owner], moments[number])
            maps[number] = standardize(maps[number, None], expected[None], spread[None])[0]
        else:
            maps[number] = detector.standardize_maps(maps[number, None], nearest[number, None])[0]
    units = known.units if known else _units(maps, detector.roi[nearest])
    detector.map_spreads[present] *= units
    scores = detector.image_score(within(detector.roi, nearest, maps.div_(units).sum(1), OUTSIDE))
    of_classes = [scores[members[index]].tolist() for index in present]
    suspects = [paths[members[index][place]] for index, places in zip(present, conspicuous(of_classes))
                for place in places]
    for index, (mean, std) in zip(present, class_statistics(of_classes, known)):
        detector.score_mean[index], detector.score_std[index] = mean, std
    normalised = (scores - detector.score_mean[nearest]) / detector.score_std[nearest]
    found: dict[str, list[float]] = {}
    named: dict[str, dict[str, float]] = {}
    taken_for: Counter[tuple[str, str]] = Counter()
    for path, owner, nearest_class, score in zip(paths, owners, nearest.tolist(), normalised.tolist()):
        name = classes[owner] if owner == nearest_class else ""
        found.setdefault(name, []).append(score)
        named.setdefault(name, {})[tail_digest(path)] = float(f"{score:.6g}")
        taken_for[classes[owner], classes[nearest_class]] += 1
    # Few or identical images do not show their class's spread, and a copy of one must not exceed a threshold of 0.
    return HeldOut({name: [*sorted(values)[:-1], max(1.0, *values)] for name, values in found.items()}, taken_for,
                   suspects, units.flatten().tolist(), named if len(paths) <= MOST_NAMED else {})


def fit_statistics_from_files(detector: Detector, raw_maps: RawMaps, classes: Sequence[str],
                              held_out: Sequence[Sample], reading: Reading, device: torch.device,
                              known: Optional[Known] = None) -> HeldOut:
    """``fit_statistics``, reading the images from files and showing progress."""
    with Progress("score statistics", len(held_out)) as progress:
        def batches() -> Iterator[tuple[Sequence[Sample], Tensor]]:
            for samples, images in image_batches(held_out, reading, distributed.own_cores()):
                yield samples, images.to(device)
                progress.update(len(samples))

        return fit_statistics(detector, raw_maps, classes, batches(), known)


def refit_statistics(detector: Detector, raw_maps: RawMaps, metadata: Metadata, samples: Sequence[Sample]) -> Metadata:
    """Set the map and score statistics of a detector again, in place, from the data set that it was trained on.

    Args:
        raw_maps: computes the maps of the detector's quantized graph.
        samples: the data set, as ``dataset.training_samples`` returns it; it may have moved since.

    Returns:
        The metadata with the new thresholds; the last step of the provenance names the images.

    Raises:
        ImageError: an image cannot be read.
    """
    _, held_out = split_again(metadata, samples)
    found = fit_statistics_from_files(detector, raw_maps, metadata.classes, held_out, metadata.reading,
                                      torch.device("cpu"))
    *earlier_steps, last_step = metadata.provenance
    statistics = {"images": list_digest(sample.path for sample in samples), "count": len(samples)}
    return with_found(metadata, found).replace(provenance=[*earlier_steps, {**last_step, "statistics": statistics}])


def with_found(metadata: Metadata, found: HeldOut) -> Metadata:
    """The metadata with what held-out images showed: thresholds at its rate, their scores, units."""
    return with_thresholds(metadata, found.scores, metadata.false_positive_rate).replace(
        map_units=found.units, held_out=found.named)


def _moments(maps: Tensor, roi: Tensor) -> Tensor:
    """Mean, square of the mean, and variance of each patch of maps [N, M, h, w]: float64 [N, 3, M, h', w'].

    Only positions in the regions of interest [N, h, w] count; where there are none, all are 0.
    """
    share = F.avg_pool2d(roi[:, None].double(), PATCH, ceil_mode=True).clamp(min=1e-6)
    mean, square = (F.avg_pool2d(values.double(), PATCH, ceil_mode=True) / share
                    for values in (maps * roi[:, None], maps.square() * roi[:, None]))
    return torch.stack([mean, mean.square(), (square - mean.square()).clamp(min=0)], dim=1)


def _map_statistics(sums: Tensor, count: int, inside: Tensor, left_out: Optional[Tensor] = None
                    ) -> tuple[Tensor, Tensor]:
    """Mean and spread per patch, [M, h, w] each, from the summed moments [3, M, h, w] of ``count`` maps.

    With few images, the mean of a position is drawn towards the mean of the map, and half of its variance is the mean
    variance of the map. A single position would underestimate its spread, and noise would raise an alarm.

    Args:
        inside: patches of the region of interest, bool [h, w]. The others get the mean values of these, since
            statistics are interpolated between patches.
        left_out: moments of one of the maps, which is to be scored as a new image is scored by all maps. The other
            maps then stand for all: they draw the mean as far, and their variance is scaled to that expected of
            ``count`` maps. With two maps the other has no variance, so that of both, averaged over the map, is used.
    """
    def average(values: Tensor) -> Tensor:
        return values[:, inside].mean(1)[:, None, None]

    mean, square, within_maps = sums / count
    between = square - mean.square()
    if left_out is not None:
        mean, square, within_maps = (sums - left_out) / (count - 1)
        # n images vary about their own mean by (n - 1) / n of their variance, on average.
        between = ((square - mean.square()) * (count - 1)**2 / (count * (count - 2)) if count > 2
                   else average(between))
    variance = within_maps + between.clamp(min=0)
    level, usual = average(mean), average(variance)
    mean, variance = torch.where(inside, mean, level), torch.where(inside, variance, usual)
    expected = (count * mean + PSEUDO_COUNT * level) / (count + PSEUDO_COUNT)
    spread = ((variance + usual) / 2).sqrt()
    return expected.float(), spread.clamp(min=LEAST_SPREAD * level.abs() + 1e-6).float()


def _units(maps: Tensor, inside: Tensor) -> Tensor:
    """The unit of each of the standardised maps [N, M, h, w] in their sum: [M, 1, 1].

    Only positions ``inside`` the regions of interest count, bool [N, h, w].

    It spans from the median to the maximum that one good image in ten exceeds, so that no map drowns the others with
    the tail of its noise.
    """
    units = [one.masked_fill(~inside, -torch.inf).amax((1, 2)).quantile(0.9) - one.masked_select(inside).median()
             for one in maps.unbind(1)]  # one by one: maps of many images fill the memory
    return torch.stack(units).clamp(min=LEAST_UNIT)[:, None, None]
