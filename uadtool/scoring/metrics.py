"""How well scores and anomaly maps tell anomalous from good.

Everywhere a label is True for anomalous, a higher score means more anomalous, and scores are finite. Every curve here
is made of counts at ascending thresholds, so images (one threshold per distinct score) and pixels (one per histogram
bin) share the code, and equal scores count half by the trapezoid rule.
"""

from typing import Sequence, Tuple

import numpy as np


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve: how often an anomalous image scores above a good one; equal scores count half.

    Raises:
        ValueError: the lengths differ, or a label is missing (both are needed).
    """
    _, good, anomalous = _counts(*checked(labels, scores))
    return roc_area(good, anomalous)


def average_precision(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Mean of the precisions at each threshold, weighted by the gain in recall (a step curve, no interpolation).

    Raises:
        ValueError: as ``auroc``.
    """
    _, good, anomalous = _counts(*checked(labels, scores))
    false, true = counts_above(good), counts_above(anomalous)
    return float(np.sum(np.diff(true) * true[1:] / (true[1:] + false[1:])) / true[-1])


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[float, float]:
    """The best F1 over all thresholds, and the highest threshold that has it (scores equal to it are anomalous).

    Raises:
        ValueError: as ``auroc``.
    """
    thresholds, good, anomalous = _counts(*checked(labels, scores))
    false, true = counts_above(good)[1:], counts_above(anomalous)[1:]
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[::-1][best])


def roc_curve(labels: Sequence[bool], scores: Sequence[float], points: int = 200) -> Tuple[np.ndarray, np.ndarray]:
    """The false-positive rates and true-positive rates, both from 0 to 1, of thresholds from high to low.

    Of more than ``points`` thresholds those are kept that lie evenly along the curve.

    Raises:
        ValueError: as ``auroc``.
    """
    _, good, anomalous = _counts(*checked(labels, scores))
    false, true = counts_above(good), counts_above(anomalous)
    false, true = false / false[-1], true / true[-1]
    if len(false) > points:
        kept = np.unique(np.searchsorted(false + true, np.linspace(0, 2, points)).clip(0, len(false) - 1))
        false, true = false[kept], true[kept]
    return false, true


def checked(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(labels, bool), np.asarray(scores, float)
    if truth.shape != values.shape:
        raise ValueError(f"{len(truth)} labels for {len(values)} scores")
    if truth.all() or not truth.any():
        raise ValueError("both good and anomalous images are needed")
    return truth, values


def _counts(labels: np.ndarray, scores: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores, ascending, and how many good and how many anomalous images have each."""
    distinct, place = np.unique(scores, return_inverse=True)
    good, anomalous = (np.bincount(place[chosen], minlength=len(distinct)) for chosen in (~labels, labels))
    return distinct, good, anomalous


def counts_above(counts: np.ndarray) -> np.ndarray:
    """How many lie at or above each threshold, from the highest threshold (after a leading zero) to the lowest."""
    return np.append(0.0, np.cumsum(counts[::-1], dtype=float))


def trapezoid_area(x: np.ndarray, y: np.ndarray) -> float:
    """The area under y(x), by the trapezoid rule."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def roc_area(good: np.ndarray, anomalous: np.ndarray) -> float:
    false, true = counts_above(good), counts_above(anomalous)
    return float(trapezoid_area(false, true) / (false[-1] * true[-1]))
