"""How well scores and anomaly maps tell anomalous from good.

Everywhere a label is True for anomalous, a higher score means more anomalous, and scores are finite. Every curve here
is made of counts at ascending thresholds, so images (one threshold per distinct score) and pixels (one per histogram
bin) share the code, and equal scores count half by the trapezoid rule.
"""

import base64
import json
import zlib
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

_BATCH = 50  # resamples worked on at a time: bounds the memory
_UNPACKED = 8 << 20  # bytes of pixel counts at most: 65,536 bins have less


def auroc(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """Area under the ROC curve: how often an anomalous image scores above a good one; equal scores count half.

    Raises:
        ValueError: the lengths differ, or a label is missing (both are needed).
    """
    _, good, anomalous = _counts(*_checked(labels, scores))
    return _roc_area(good, anomalous)


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


def roc_curve(labels: Sequence[bool], scores: Sequence[float], points: int = 200) -> Tuple[np.ndarray, np.ndarray]:
    """The false-positive rates and true-positive rates, both from 0 to 1, of thresholds from high to low.

    Of more than ``points`` thresholds those are kept that lie evenly along the curve.

    Raises:
        ValueError: as ``auroc``.
    """
    _, good, anomalous = _counts(*_checked(labels, scores))
    false, true = _above(good), _above(anomalous)
    false, true = false / false[-1], true / true[-1]
    if len(false) > points:
        kept = np.unique(np.searchsorted(false + true, np.linspace(0, 2, points)).clip(0, len(false) - 1))
        false, true = false[kept], true[kept]
    return false, true


class PixelMetrics:
    """Pixel AUROC and AUPRO of a stream of anomaly maps, in about 1.5 MB whatever the number of images.

    Pixels are counted in a fixed grid of 65,536 bins: the upper half of float32 in its numeric order. A bin is at most
    1/128 of its value wide, so no range has to be known beforehand. The grid is finest around zero, where the scores of
    good images lie: figures are within 0.0005 of the exact ones there, and useless for a map whose whole spread is less
    than 1/128 of its offset.
    """

    _BINS = 1 << 16
    _REGION = 1 << 40  # what a region weighs: in integers, so that no order of images changes a sum

    def __init__(self) -> None:
        self._good = np.zeros(self._BINS, np.int64)
        self._anomalous = np.zeros(self._BINS, np.int64)
        self._overlap = np.zeros(self._BINS, np.int64)  # each pixel of a region weighs 1 / area of the region
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
        weights = np.rint(self._REGION / np.bincount(regions)[regions])
        self._anomalous += np.bincount(bins, minlength=self._BINS)
        self._overlap += np.bincount(bins, weights, minlength=self._BINS).astype(np.int64)
        self._regions += count

    def merge(self, other: "PixelMetrics") -> None:
        """Add the images that ``other`` has seen."""
        self._good += other._good
        self._anomalous += other._anomalous
        self._overlap += other._overlap
        self._regions += other._regions

    def to_json(self) -> Dict[str, Any]:
        """All that was counted, to be merged elsewhere: usually 5 to 35 KB of text, whatever the number of images.

        ``regions`` is their number. ``bins`` is the base64 of the zlib-compressed JSON text of four lists about the
        bins that are not empty, ascending: distance to the bin before, good pixels, anomalous ones, their overlap.
        """
        filled = np.flatnonzero(self._good + self._anomalous)
        lists = [np.diff(filled, prepend=0), self._good[filled], self._anomalous[filled], self._overlap[filled]]
        text = json.dumps([values.tolist() for values in lists], separators=(",", ":"))
        return {"regions": self._regions, "bins": base64.b64encode(zlib.compress(text.encode(), 9)).decode()}

    @classmethod
    def from_json(cls, counted: Dict[str, Any]) -> "PixelMetrics":
        """The opposite of ``to_json``.

        Raises:
            ValueError: that did not write it.
        """
        found = cls()
        try:
            unpacking = zlib.decompressobj()
            text = unpacking.decompress(base64.b64decode(counted["bins"], validate=True), _UNPACKED)
            if not unpacking.eof:
                raise ValueError("the bins are cut short, or too many")
            lists = np.array(json.loads(text))
            if lists.ndim != 2 or len(lists) != 4 or (lists.size and lists.dtype.kind != "i") or (lists < 0).any():
                raise ValueError("not four lists of counts")
            distances, *counts = lists.astype(np.int64)
            filled = np.cumsum(distances)
            if not distances[1:].all():
                raise ValueError("a bin is there twice")
            if max((values.sum(dtype=float) for values in counts[:2]), default=0) >= 2 ** 53:
                raise ValueError("there are more pixels than can be")
            regions, anomalous = counted["regions"], int(counts[1].sum())
            if type(regions) is not int or not 0 <= regions <= anomalous:
                raise ValueError(f"{regions!r:.40} is no number of regions in {anomalous} anomalous pixels")
            # each pixel's weight was rounded; the float sum keeps the exact one from running over
            if counts[2].sum(dtype=float) >= 2 ** 62 or int(counts[2].sum()) > cls._REGION * regions + anomalous:
                raise ValueError(f"the overlap is more than {regions} regions have")
            found._good[filled], found._anomalous[filled], found._overlap[filled] = counts
            found._regions = regions
        except (IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"its pixel counts cannot be read: {error}") from error
        return found

    def auroc(self) -> Optional[float]:
        """Pixel AUROC, or None without good or without anomalous pixels."""
        if not self._good.any() or not self._anomalous.any():
            return None
        return _roc_area(self._good, self._anomalous)

    def aupro(self, limit: float = 0.3) -> Optional[float]:
        """Area under the per-region overlap curve up to the false-positive rate ``limit``, divided by ``limit``.

        The overlap is the share of an anomalous region above the threshold, averaged over all regions (8-connected);
        the false-positive rate is the share of all good pixels. None without good pixels or regions. Bergmann et al.,
        "The MVTec Anomaly Detection Dataset", IJCV 129, 2021.
        """
        if not self._good.any() or not self._regions:
            return None
        rate = _above(self._good) / self._good.sum()
        overlap = _above(self._overlap) / (self._REGION * self._regions)
        inside = rate <= limit
        at_limit = np.interp(limit, rate, overlap)
        return _area(np.append(rate[inside], limit), np.append(overlap[inside], at_limit)) / limit

    @staticmethod
    def _bins(values: np.ndarray) -> np.ndarray:
        # Read as a signed integer, float32 is in order once all but the sign of negative numbers is inverted. Adding
        # zero makes -0.0 equal to 0.0.
        bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
        ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
        return np.asarray((ordered >> 16).astype(np.intp) + (PixelMetrics._BINS >> 1))


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
    truth, a = _checked(labels, scores_a)
    b = _checked(labels, scores_b)[1]
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


def _checked(labels: Sequence[bool], scores: Sequence[float]) -> Tuple[np.ndarray, np.ndarray]:
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


def _above(counts: np.ndarray) -> np.ndarray:
    """How many lie at or above each threshold, from the highest threshold (after a leading zero) to the lowest."""
    return np.append(0.0, np.cumsum(counts[::-1], dtype=float))


def _area(x: np.ndarray, y: np.ndarray) -> float:
    """The area under y(x), by the trapezoid rule."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _roc_area(good: np.ndarray, anomalous: np.ndarray) -> float:
    false, true = _above(good), _above(anomalous)
    return float(_area(false, true) / (false[-1] * true[-1]))
