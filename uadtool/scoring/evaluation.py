"""How well the scores and maps of a run agree with the labels and masks: the ``metrics`` object of its summary."""

from typing import Any, Callable, Dict, Iterable, List

import numpy as np

from uadtool.scoring import metrics
from uadtool.scoring.pixel_metrics import PixelMetrics


class Evaluation:
    """Detection figures of labelled images, gathered image by image, in any order.

    A class is named by its name, or by ``""`` where none is known. ``threshold`` is the score above which an image
    counts as anomalous.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._classes: List[str] = []
        self._labels: List[bool] = []
        self._scores: List[float] = []
        self._raw_scores: List[float] = []
        self._pixels: Dict[str, PixelMetrics] = {}

    def add(self, class_name: str, anomalous: bool, score: float, raw_score: float) -> None:
        """Count an image; ``anomalous`` is its label."""
        self._classes.append(class_name)
        self._labels.append(anomalous)
        self._scores.append(score)
        self._raw_scores.append(raw_score)

    def add_pixels(self, class_name: str, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of an image: float32 [H, W] and its ground truth, bool [H, W]."""
        self._pixels.setdefault(class_name, PixelMetrics()).update(anomaly_map, mask)

    def pixels(self) -> Dict[str, Dict[str, Any]]:
        """The pixels counted so far, by class; see ``PixelMetrics.to_json``."""
        return {name: pixels.to_json() for name, pixels in sorted(self._pixels.items())}

    def merge_pixels(self, counted: Dict[str, Dict[str, Any]]) -> None:
        """Add what another run's ``pixels`` returned.

        Raises:
            ValueError: it did not, or counts pixels of a class without images.
        """
        if counted.keys() - set(self._classes):
            raise ValueError(f"it counts pixels of {min(counted.keys() - set(self._classes))!r:.80} and no images")
        for name, of_class in counted.items():
            self._pixels.setdefault(name, PixelMetrics()).merge(PixelMetrics.from_json(of_class))

    def figures(self) -> Dict[str, Any]:
        """The ``metrics`` object of the summary: what the labels and masks seen suffice for.

        Each figure has its value over all images in one list, or all pixels of classes with masks (``pooled``), for
        each class that has both labels (``per_class``), and their ``mean``, which is the pooled value when no class is
        known.
        """
        if not self._labels:
            return {}
        labels, scores = np.array(self._labels, bool), np.array(self._scores)
        found: Dict[str, Any] = {}
        if labels.any() and not labels.all():
            found["image_auroc"] = {**self._images(metrics.auroc, scores),
                                    "pooled_raw": rounded(metrics.auroc(self._labels, self._raw_scores))}
            found["average_precision"] = self._images(metrics.average_precision, scores)
            found["f1_max"] = self._images(lambda labels, scores: metrics.f1_max(labels, scores)[0], scores)
        for name, chosen in (("false_positive_rate", ~labels), ("recall", labels)):
            if chosen.any():
                found[name] = rounded(np.mean(scores[chosen] > self._threshold))
        with_masks = {name: pixels for name, pixels in sorted(self._pixels.items()) if pixels.auroc() is not None}
        if with_masks:
            pooled = PixelMetrics()
            for pixels in with_masks.values():
                pooled.merge(pixels)
            for name, figure in (("pixel_auroc", PixelMetrics.auroc), ("aupro", PixelMetrics.aupro)):
                found[name] = _figures(figure(pooled), {key: figure(pixels) for key, pixels in with_masks.items()},
                                       with_masks)
        return found

    def _images(self, figure: Callable[[Any, Any], float], scores: np.ndarray) -> Dict[str, Any]:
        labels, classes = np.array(self._labels), np.array(self._classes)
        members = {name: classes == name for name in sorted(set(self._classes))}
        return _figures(figure(labels, scores), {
            name: figure(labels[chosen], scores[chosen])
            for name, chosen in members.items() if labels[chosen].any() and not labels[chosen].all()
        }, members)


def rounded(value: Any) -> float:
    """Six digits: all that a figure or a float32 is good for."""
    return float(f"{value:.6g}")


def _figures(pooled: Any, per_class: Dict[str, Any], classes: Iterable[str]) -> Dict[str, Any]:
    """Of the ``classes`` those in ``per_class`` have a figure; without a name there is no class."""
    named = {name: value for name, value in per_class.items() if name}
    found = {"pooled": rounded(pooled), "per_class": {name: rounded(value) for name, value in named.items()}}
    if named:
        return {"mean": rounded(sum(named.values()) / len(named)), **found}
    return found if any(classes) else {"mean": rounded(pooled), **found}
