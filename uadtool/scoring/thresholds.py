"""Thresholds from the scores of good images."""

from typing import List, Sequence

MOST_SCORES = 1001
"""Scores, or quantiles of more scores, that a model file holds at most."""


def threshold_at(scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest of ``scores`` that at most this share of them exceeds.

    A rate below 1 / (number of scores) gives the highest score.
    """
    allowed = int(false_positive_rate * len(scores) + 1e-9)
    return sorted(scores)[len(scores) - 1 - allowed]


def bounded_scores(scores: Sequence[float]) -> List[float]:
    """The scores, sorted; of more than ``MOST_SCORES``, as many quantiles."""
    count, ordered = min(len(scores), MOST_SCORES), sorted(scores)
    quantiles = (ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count))
    return [float(f"{score:.6g}") for score in quantiles]
