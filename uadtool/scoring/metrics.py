"""How well scores and anomaly maps separate anomalous images from good ones.

A label is True for anomalous, a higher score means more anomalous, and scores are finite. Every curve consists of
counts at ascending thresholds. Images (a threshold for each distinct score) and pixels (a threshold for each histogram
bin) therefore share the code, and the trapezoid rule counts equal scores half.

Every function of labels and scores raises a ValueError if the lengths differ or a label is missing (both are needed).
"""

from typing import Any, Sequence, Tuple

import numpy as np


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve: the share of pairs in which the anomalous image scores above the good image.

    Equal scores count half.
    """
    _, good, anomalous = _counts(labels, scores)
    return area_under_roc(good, anomalous)


def average_precision(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Mean of the precisions at each threshold, weighted by the gain in recall (a step curve, no interpolation)."""
    _, good, anomalous = _counts(labels, scores)
    false, true = counts_above(good), counts_above(anomalous)
    return float(np.sum(np.diff(true) * true[1:] / (true[1:] + false[1:])) / true[-1])


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[float, float]:
    """The best F1 over all thresholds, and the highest threshold with it. Scores equal to it count as anomalous."""
    thresholds, good, anomalous = _counts(labels, scores)
    false, true = counts_above(good)[1:], counts_above(anomalous)[1:]
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[::-1][best])


def roc_curve(labels: Sequence[bool], scores: Sequence[float], points: int = 200) -> Tuple[np.ndarray, np.ndarray]:
    """False-positive rates and true-positive rates, both from 0 to 1, of thresholds from high to low.

    With more than ``points`` thresholds, the result has only ``points`` that lie evenly along the curve.
    """
    _, good, anomalous = _counts(labels, scores)
    false, true = counts_above(good), counts_above(anomalous)
    false, true = false / false[-1], true / true[-1]
    if len(false) > points:
        kept = np.unique(np.searchsorted(false + true, np.linspace(0, 2, points)).clip(0, len(false) - 1))
        false, true = false[kept], true[kept]
    return false, true


def rounded(value: Any) -> float:
    """The value with six digits: a figure or a float32 is not more precise."""
    return float(f"{value:.6g}")


def validated(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[np.ndarray, np.ndarray]:
    """The labels, bool [N], and the scores, float64 [N]."""
    truth, values = np.asarray(labels, bool), np.asarray(scores, float)
    if truth.shape != values.shape:
        raise ValueError(f"{len(truth)} labels for {len(values)} scores")
    if truth.all() or not truth.any():
        raise ValueError("both good and anomalous images are needed")
    return truth, values


def _counts(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores, ascending, and the numbers of good and of anomalous images with each."""
    truth, values = validated(labels, scores)
    distinct, place = np.unique(values, return_inverse=True)
    good, anomalous = (np.bincount(place[truth == label], minlength=len(distinct)) for label in (False, True))
    return distinct, good, anomalous


def counts_above(counts: np.ndarray) -> np.ndarray:
    """The sums of ``counts`` at or above each threshold, after a leading zero, from the highest threshold down."""
    return np.append(0.0, np.cumsum(counts[::-1], dtype=float))


def area_under(x: np.ndarray, y: np.ndarray) -> float:
    """The area under y(x), by the trapezoid rule."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def area_under_roc(good: np.ndarray, anomalous: np.ndarray) -> float:
    """AUROC of the numbers of good and of anomalous images, or pixels, at ascending thresholds."""
    false, true = counts_above(good), counts_above(anomalous)
    return float(area_under(false, true) / (false[-1] * true[-1]))
