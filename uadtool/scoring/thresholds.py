"""Thresholds from the scores of good images."""

from typing import List, Sequence

MOST_SCORES = 1001


def threshold_at(scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest of the scores that no more than this share of them exceeds.

    A rate below 1 / (number of scores) gives the highest one.
    """
    allowed = int(false_positive_rate * len(scores) + 1e-9)
    return sorted(scores)[len(scores) - 1 - allowed]


def bounded_scores(scores: Sequence[float]) -> List[float]:
    """The scores, sorted; of very many, as many quantiles as a file should hold."""
    count, ordered = min(len(scores), MOST_SCORES), sorted(scores)
    quantiles = (ordered[round(place * (len(ordered) - 1) / max(1, count - 1))] for place in range(count))
    return [float(f"{score:.6g}") for score in quantiles]
