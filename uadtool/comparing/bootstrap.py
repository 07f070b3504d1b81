"""Confidence intervals of the difference between two models' image AUROC."""

from typing import Callable, Dict, NamedTuple, Optional, Sequence

import numpy as np

from uadtool.scoring.metrics import checked

_BATCH = 50  # resamples worked on at a time: bounds the memory


class Interval(NamedTuple):
    """A difference and the bounds of its confidence interval."""

    difference: float
    low: float
    high: float


class Differences(NamedTuple):
    """Of the image AUROC over all images in one list (``pooled``), of each class that has both labels, of their mean.

    ``mean`` is None where no class has both.
    """

    pooled: Interval
    mean: Optional[Interval]
    per_class: Dict[str, Interval]


def paired_bootstrap(
    labels: Sequence[bool],
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    classes: Optional[Sequence[str]] = None,
    repetitions: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Differences:
    """How far the image AUROC of b minus that of a could be chance: percentile intervals over resamples of the images.

    Images are drawn with replacement within each class and label, the same draw for both models and all figures.

    Raises:
        ValueError: the lengths differ, or a label is missing.
    """
    truth, a = checked(labels, scores_a)
    b = checked(labels, scores_b)[1]
    names = np.zeros(len(truth)) if classes is None else np.asarray(classes)
    members = {name: np.flatnonzero(names == name) for name in np.unique(names)}
    strata = [index[truth[index] == label] for index in members.values() for label in np.unique(truth[index])]
    both = {} if classes is None else {str(name): index for name, index in members.items()
                                       if truth[index].any() and not truth[index].all()}
    areas = [(_weighted_area(truth, a, index), _weighted_area(truth, b, index))
             for index in (np.arange(len(truth)), *both.values())]

    def differences(weights: np.ndarray) -> np.ndarray:
        """[1 + classes, resamples]: pooled, then each class."""
        return np.stack([of_b(weights) - of_a(weights) for of_a, of_b in areas])

    random = np.random.default_rng(seed)
    resampled = []
    for start in range(0, repetitions, _BATCH):
        weights = np.empty((min(_BATCH, repetitions - start), len(truth)))
        for index in strata:
            even = np.full(len(index), 1 / len(index))
            weights[:, index] = random.multinomial(len(index), even, size=len(weights))
        resampled.append(differences(weights))
    observed, drawn = differences(np.ones((1, len(truth))))[:, 0], np.concatenate(resampled, axis=1)

    def interval(difference: float, drawn: np.ndarray) -> Interval:
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(float(difference), float(low), float(high))

    return Differences(
        interval(observed[0], drawn[0]),
        interval(observed[1:].mean(), drawn[1:].mean(axis=0)) if both else None,
        {name: interval(*found) for name, *found in zip(both, observed[1:], drawn[1:])},
    )


def _weighted_area(truth: np.ndarray, scores: np.ndarray, index: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function of weights [resamples, images], which gives the AUROC [resamples] of the images ``index``.

    It counts, for each anomalous image, the weight of the good ones below it. All sorting is done once, here.
    """
    good, anomalous = (index[truth[index] == label] for label in (False, True))
    good, anomalous = (of[np.argsort(scores[of], kind="stable")] for of in (good, anomalous))
    below, upto = (np.searchsorted(scores[good], scores[anomalous], side) for side in ("left", "right"))

    def area(weights: np.ndarray) -> np.ndarray:
        reached = np.zeros((len(weights), len(good) + 1))
        np.cumsum(weights[:, good], axis=1, out=reached[:, 1:])
        chosen = weights[:, anomalous]
        won = np.sum(chosen * (reached[:, below] + reached[:, upto]), axis=1) / 2
        return np.asarray(won / (reached[:, -1] * chosen.sum(axis=1)))

    return area
