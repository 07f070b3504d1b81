"""Confidence intervals of the difference between two models' image AUROC."""

from typing import Callable, Dict, NamedTuple, Optional, Sequence

import numpy as np

from uadtool.scoring.metrics import validated

_BATCH = 50  # resamples at a time, to bound the memory


class Interval(NamedTuple):
    """A difference and the bounds of its confidence interval."""

    difference: float
    low: float
    high: float


class Differences(NamedTuple):
    """Differences of the image AUROC: over all images in one list (``pooled``), and of each class with both labels.

    ``mean`` is the difference of the mean over these classes, None without such a class.
    """

    pooled: Interval
    mean: Optional[Interval]
    per_class: Dict[str, Interval]


def paired_bootstrap(labels: Sequence[bool], scores_a: Sequence[float], scores_b: Sequence[float],
                     classes: Optional[Sequence[str]] = None, repetitions: int = 1000, seed: int = 0,
                     confidence: float = 0.95) -> Differences:
    """The image AUROC of b minus that of a, with percentile intervals over resamples of the images.

    Images are drawn with replacement within each class and label. Both models and all figures share each draw.

    Raises:
        ValueError: the lengths differ, or a label is missing.
    """
    truth, a = validated(labels, scores_a)
    _, b = validated(labels, scores_b)
    names = np.zeros(len(truth)) if classes is None else np.asarray(classes)
    members = {name: np.flatnonzero(names == name) for name in np.unique(names)}
    strata = [images[truth[images] == label] for images in members.values() for label in np.unique(truth[images])]
    with_both_labels = {} if classes is None else {str(name): images for name, images in members.items()
                                                   if truth[images].any() and not truth[images].all()}
    areas = [(_weighted_auroc(truth, a, images), _weighted_auroc(truth, b, images))
             for images in (np.arange(len(truth)), *with_both_labels.values())]

    def differences(weights: np.ndarray) -> np.ndarray:
        """[1 + classes, resamples]: pooled, then each class."""
        return np.stack([area_b(weights) - area_a(weights) for area_a, area_b in areas])

    random = np.random.default_rng(seed)
    batches = []
    for start in range(0, repetitions, _BATCH):
        weights = np.empty((min(_BATCH, repetitions - start), len(truth)))
        for images in strata:
            uniform = np.full(len(images), 1 / len(images))
            weights[:, images] = random.multinomial(len(images), uniform, size=len(weights))
        batches.append(differences(weights))
    observed, resampled = differences(np.ones((1, len(truth))))[:, 0], np.concatenate(batches, axis=1)

    def interval(difference: float, resampled: np.ndarray) -> Interval:
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(float(difference), float(low), float(high))

    return Differences(
        interval(observed[0], resampled[0]),
        interval(observed[1:].mean(), resampled[1:].mean(axis=0)) if with_both_labels else None,
        {name: interval(*figures) for name, *figures in zip(with_both_labels, observed[1:], resampled[1:])},
    )


def _weighted_auroc(truth: np.ndarray, scores: np.ndarray, images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights [resamples, all images] to the AUROC [resamples] of ``images`` (indices).

    For each anomalous image it counts the weight of the good images with lower scores. All sorting is done here, once.
    """
    good, anomalous = (images[truth[images] == label] for label in (False, True))
    good, anomalous = (group[np.argsort(scores[group], kind="stable")] for group in (good, anomalous))
    below, upto = (np.searchsorted(scores[good], scores[anomalous], side) for side in ("left", "right"))

    def area(weights: np.ndarray) -> np.ndarray:
        cumulative = np.zeros((len(weights), len(good) + 1))
        np.cumsum(weights[:, good], axis=1, out=cumulative[:, 1:])
        anomalous_weights = weights[:, anomalous]
        wins = np.sum(anomalous_weights * (cumulative[:, below] + cumulative[:, upto]), axis=1) / 2
        return np.asarray(wins / (cumulative[:, -1] * anomalous_weights.sum(axis=1)))

    return area
