"""Thresholds and p-values from the scores of good images: split conformal prediction (Vovk et al., 2005)."""

from bisect import bisect_left
from itertools import chain
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

from uadtool.data.splits import LEAST_RATE, images_needed
from uadtool.metadata import Metadata
from uadtool.terminal import log

MOST_SCORES = 10_001
"""Scores of a class, or quantiles of more scores, that a model file holds at most."""

PSEUDO_COUNT = 20
"""Weight, in images, of the common threshold against that of the scores of a class.

On held-out images of four classes, 32 of each, a rate of 0.01 became 0.031 without it, 0.024 with it and 0.015 with the
common threshold alone; synthetic anomalies were found at a rate of 0.614, 0.607 and 0.598.
"""

Scores = Mapping[str, Sequence[float]]
"""Scores of good images by class; those of the class ``""`` only count in the common threshold."""


class Thresholds(NamedTuple):
    """The score above which an image is anomalous: by its nearest class, or the ``common`` one if that has none.

    ``good`` are sorted scores of good images by class; p-values come from them. ``rate`` is the false-positive rate
    that was asked for, None if a threshold was.
    """

    common: float
    by_class: Mapping[str, float] = {}
    good: Mapping[str, List[float]] = {}
    rate: Optional[float] = None

    @classmethod
    def of_model(cls, metadata: Metadata) -> "Thresholds":
        """The thresholds that a model file holds."""
        return cls(metadata.threshold, metadata.thresholds, metadata.good_scores, metadata.false_positive_rate)

    @classmethod
    def at(cls, false_positive_rate: float, good_scores: Scores, common: Optional[float] = None) -> "Thresholds":
        """The thresholds that this share of good images exceeds.

        A class has few images, and their highest score says little about its rate: it counts as so many images, and the
        common threshold as ``PSEUDO_COUNT`` more.

        Args:
            common: the common threshold; None for that of these scores.

        Raises:
            ValueError: there are no scores.
        """
        if common is None:
            common = threshold_at(list(chain.from_iterable(good_scores.values())), false_positive_rate)
        by_class = {name: (len(scores) * threshold_at(scores, false_positive_rate) + PSEUDO_COUNT * common)
                    / (len(scores) + PSEUDO_COUNT) for name, scores in good_scores.items() if name and scores}
        return cls(common, {name: float(f"{threshold:.6g}") for name, threshold in by_class.items()},
                   bounded_scores(good_scores), false_positive_rate)

    def of(self, nearest_class: str) -> float:
        """The threshold of an image."""
        return self.by_class.get(nearest_class, self.common)

    def p_value(self, score: float, nearest_class: str) -> Optional[float]:
        """The share of good images of the class, this one included, that score at least as high; None if none is known.

        If an image is as good as these n, its p-value is at most p with a probability of at most p, for every p; it is
        at least 1 / (n + 1).
        """
        scores = self.good.get(nearest_class)
        if not scores:
            return None
        return float(f"{(1 + len(scores) - bisect_left(scores, score)) / (1 + len(scores)):.6g}")


def with_thresholds(metadata: Metadata, good_scores: Scores, false_positive_rate: float) -> Metadata:
    """The metadata with the thresholds that this share of good images exceeds, and with their scores.

    Raises:
        ValueError: there are no scores.
    """
    thresholds = Thresholds.at(false_positive_rate, good_scores)
    return metadata.replace(threshold=thresholds.common, thresholds=dict(thresholds.by_class),
                            false_positive_rate=false_positive_rate, good_scores=dict(thresholds.good))


def threshold_at(scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest of n ``scores`` that at most this share of n + 1 exceeds, a new one included.

    So a new good image exceeds it with at most this probability, if it is drawn as these were: a threshold that this
    share of the n exceeds promises less. A rate below 1 / (n + 1) gives the highest score.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("no scores")
    allowed = max(0, int(false_positive_rate * (len(scores) + 1) + 1e-9) - 1)
    return sorted(scores)[len(scores) - 1 - allowed]


def warn_of_few(count: int, false_positive_rate: float) -> None:
    """Warn if so many good images cannot promise the rate."""
    tiny = false_positive_rate < LEAST_RATE
    if tiny or count < images_needed(false_positive_rate):
        remedy = "cannot be promised" if tiny else f"requires {images_needed(false_positive_rate)}"
        log.warning("%d good images promise a false-positive rate of %.2g, and the threshold is the highest of their "
                    "scores; a rate of %g %s", count, 1 / (count + 1), false_positive_rate, remedy)


def bounded_scores(scores: Scores) -> Dict[str, List[float]]:
    """The scores of each class, sorted; of more than ``MOST_SCORES``, as many quantiles."""
    return {name: _quantiles(values) for name, values in scores.items()}


def _quantiles(scores: Sequence[float]) -> List[float]:
    count, ordered = min(len(scores), MOST_SCORES), sorted(scores)
    quantiles = (ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count))
    return [float(f"{score:.6g}") for score in quantiles]
