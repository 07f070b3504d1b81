"""How well scores and anomaly maps tell anomalous from good.

Everywhere a label is True for anomalous, a higher score means more anomalous, and scores are finite. Every curve here
is made of counts at ascending thresholds, so images (one threshold per distinct score) and pixels (one per histogram
bin) share the code, and equal scores count half by the trapezoid rule.
"""

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

_BATCH = 50  # resamples worked on at a time: bounds the memory


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve: how often an anomalous image scores above a good one; equal scores count half.

    Raises:
        ValueError: the lengths differ, or a label is missing (both are needed).
    """
    _, good, anomalous = _counts(*_checked(labels, scores))
    return float(_roc_area(good, anomalous))


def average_precision(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Mean of the precisions at each threshold, weighted by the gain in recall (a step curve, no interpolation).

    Raises:
        ValueError: as ``auroc``.
    """
    _, good, anomalous = _counts(*_checked(labels, scores))
    false, true = _above(good), _above(anomalous)
    return float(np.sum(np.diff(true) * true[1:] / (true[1:] + false[1:])) / true[-1])


def f1_max(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[float, float]:
    """The best F1 over all thresholds, and the highest threshold that has it (scores equal to it are anomalous).

    Raises:
        ValueError: as ``auroc``.
    """
    thresholds, good, anomalous = _counts(*_checked(labels, scores))
    false, true = _above(good)[1:], _above(anomalous)[1:]
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[::-1][best])


class PixelMetrics:
    """Pixel AUROC and AUPRO of a stream of anomaly maps, in about 1.5 MB whatever the number of images.

    Pixels are counted in a fixed grid of 65,536 bins: the upper half of float32 in its numeric order. A bin is at most
    1/128 of its value wide, so no range has to be known beforehand. The grid is finest around zero, where the scores of
    good images lie: figures are within 0.0005 of the exact ones there, and useless for a map whose whole spread is less
    than 1/128 of its offset.
    """

    _BINS = 1 << 16

    def __init__(self) -> None:
        self._good = np.zeros(self._BINS, np.int64)
        self._anomalous = np.zeros(self._BINS, np.int64)
        self._overlap = np.zeros(self._BINS)  # each pixel of a region weighs 1 / area of the region
        self._regions = 0

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Add one image: float32 [H, W] and its ground truth, bool [H, W] (all False for a good image).

        Raises:
            ValueError: the shapes differ or the map holds a NaN.
        """
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"the anomaly map is {anomaly_map.shape}, its mask {mask.shape}")
        if np.isnan(anomaly_map).any():
            raise ValueError("the anomaly map holds values that are not numbers")
        bins = self._bins(anomaly_map)
        self._good += np.bincount(bins[~mask], minlength=self._BINS)
        if not mask.any():
            return
        from scipy.ndimage import label

        regions, count = label(mask, structure=np.ones((3, 3)))
        regions, bins = regions[mask], bins[mask]
        weights = 1 / np.bincount(regions)[regions]
        self._anomalous += np.bincount(bins, minlength=self._BINS)
        self._overlap += np.bincount(bins, weights, minlength=self._BINS)
        self._regions += count

    def merge(self, other: "PixelMetrics") -> None:
        """Add the images that ``other`` has seen."""
        self._good += other._good
        self._anomalous += other._anomalous
        self._overlap += other._overlap
        self._regions += other._regions

    def auroc(self) -> Optional[float]:
        """Pixel AUROC, or None without good or without anomalous pixels."""
        if not self._good.any() or not self._anomalous.any():
            return None
        return float(_roc_area(self._good, self._anomalous))

    def aupro(self, limit: float = 0.3) -> Optional[float]:
        """Area under the per-region overlap curve up to the false-positive rate ``limit``, divided by ``limit``.

        The overlap is the share of an anomalous region above the threshold, averaged over all regions (8-connected);
        the false-positive rate is the share of all good pixels. None without good pixels or regions. Bergmann et al.,
        "The MVTec Anomaly Detection Dataset", IJCV 129, 2021.
        """
        if not self._good.any() or not self._regions:
            return None
        rate = _above(self._good) / self._good.sum()
        overlap = _above(self._overlap) / self._regions
        inside = rate <= limit
        at_limit = np.interp(limit, rate, overlap)
        return float(_area(np.append(rate[inside], limit), np.append(overlap[inside], at_limit)) / limit)

    @staticmethod
    def _bins(values: np.ndarray) -> np.ndarray:
        # Read as an unsigned integer, float32 is in order once negative numbers are inverted and the others get
        # the top bit. Adding zero makes -0.0 equal to 0.0.
        bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)
        return np.asarray(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> 16)


class Interval(NamedTuple):
    """A difference and the bounds of its confidence interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    labels: Sequence[bool],
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    groups: Optional[Sequence[str]] = None,
    repetitions: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Dict[str, Interval]:
    """How far the image AUROC of b minus that of a could be chance: percentile intervals over resamples of the images.

    Images are drawn with replacement within each group (class) and label, the same draw for both models. Returns
    ``pooled``: all images in one list, and when ``groups`` are given ``mean``: the mean over the groups that have both
    labels (left out when none has).

    Raises:
        ValueError: the lengths differ, or a label is missing.
    """
    truth, a = _checked(labels, scores_a)
    b = _checked(labels, scores_b)[1]
    names = np.zeros(len(truth)) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    lists = {"pooled": [np.arange(len(truth))]}
    if groups is not None:
        lists["mean"] = [index for index in members if truth[index].any() and not truth[index].all()]

    def differences(weights: np.ndarray) -> Dict[str, np.ndarray]:
        def area(index: np.ndarray, scores: np.ndarray) -> np.ndarray:
            return _roc_area(*_counts(truth[index], scores[index], weights[:, index])[1:])

        return {
            name: np.mean([area(index, b) - area(index, a) for index in indices], axis=0)
            for name, indices in lists.items() if indices
        }

    random = np.random.default_rng(seed)
    strata = [index[truth[index] == label] for index in members for label in np.unique(truth[index])]
    resampled = []
    for start in range(0, repetitions, _BATCH):
        weights = np.empty((min(_BATCH, repetitions - start), len(truth)))
        for index in strata:
            even = np.full(len(index), 1 / len(index))
            weights[:, index] = random.multinomial(len(index), even, size=len(weights))
        resampled.append(differences(weights))

    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {
        name: Interval(float(observed[0]), *np.quantile(np.concatenate([part[name] for part in resampled]), tails))
        for name, observed in differences(np.ones((1, len(truth)))).items()
    }


def _checked(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(labels, bool), np.asarray(scores, float)
    if truth.shape != values.shape:
        raise ValueError(f"{len(truth)} labels for {len(values)} scores")
    if truth.all() or not truth.any():
        raise ValueError("both good and anomalous images are needed")
    return truth, values


def _counts(
    labels: np.ndarray, scores: np.ndarray, weights: Optional[np.ndarray] = None
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores, ascending, and the weight [..., distinct] of good and of anomalous images at each.

    ``weights`` are [..., images], ones when not given.
    """
    order = np.argsort(scores, kind="stable")
    labels, scores = labels[order], scores[order]
    weights = np.ones(len(order)) if weights is None else weights[..., order]
    starts = np.flatnonzero(np.diff(scores, prepend=-np.inf))
    good, anomalous = (np.add.reduceat(weights * chosen, starts, axis=-1) for chosen in (~labels, labels))
    return scores[starts], good, anomalous


def _above(counts: np.ndarray) -> np.ndarray:
    """How many lie at or above each threshold, from the highest threshold (after a leading zero) to the lowest."""
    total = np.cumsum(counts[..., ::-1], axis=-1, dtype=float)
    return np.concatenate([np.zeros_like(total[..., :1]), total], axis=-1)


def _area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The area under y(x) along the last axis, by the trapezoid rule."""
    return np.asarray(np.sum(np.diff(x) * (y[..., 1:] + y[..., :-1]), axis=-1) / 2)


def _roc_area(good: np.ndarray, anomalous: np.ndarray) -> np.ndarray:
    false, true = _above(good), _above(anomalous)
    return np.asarray(_area(false, true) / (false[..., -1] * true[..., -1]))
