"""How well the scores and maps of a run agree with the labels and masks: the ``metrics`` object of its summary."""

from typing import Any, Callable, Dict, Iterable, List

import numpy as np

from uadtool.scoring.metrics import auroc, average_precision, f1_max, rounded
from uadtool.scoring.pixel_metrics import PixelMetrics


class Evaluation:
    """Detection figures of labelled images, which are added one by one, in any order.

    A class is identified by its name, or by ``""`` if it is unknown. An image with a score above ``threshold`` counts
    as anomalous.
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
        """Add the ``pixels`` of another run.

        Raises:
            ValueError: they cannot be read, or belong to a class without images.
        """
        if counted.keys() - set(self._classes):
            raise ValueError(f"it counts pixels of {min(counted.keys() - set(self._classes))!r:.80} and no images")
        for name, pixels in counted.items():
            self._pixels.setdefault(name, PixelMetrics()).merge(PixelMetrics.from_json(pixels))

    def figures(self) -> Dict[str, Any]:
        """The ``metrics`` object of the summary, as far as the labels and masks allow.

        Each figure has its value over all images in one list, or all pixels of classes with masks (``pooled``), for
        each class with both labels (``per_class``), and their ``mean``. Without any class names, the mean is the pooled
        value.
        """
        if not self._labels:
            return {}
        labels, scores = np.array(self._labels, bool), np.array(self._scores)
        figures: Dict[str, Any] = {}
        if labels.any() and not labels.all():
            pooled_raw = rounded(auroc(self._labels, self._raw_scores))
            figures["image_auroc"] = {**self._by_class(auroc), "pooled_raw": pooled_raw}
            figures["average_precision"] = self._by_class(average_precision)
            figures["f1_max"] = self._by_class(lambda labels, scores: f1_max(labels, scores)[0])
        for name, images in (("false_positive_rate", ~labels), ("recall", labels)):
            if images.any():
                figures[name] = rounded(np.mean(scores[images] > self._threshold))
        with_masks = {name: pixels for name, pixels in sorted(self._pixels.items()) if pixels.auroc() is not None}
        if with_masks:
            pooled = PixelMetrics()
            for pixels in with_masks.values():
                pooled.merge(pixels)
            for name, metric in (("pixel_auroc", PixelMetrics.auroc), ("aupro", PixelMetrics.aupro)):
                figures[name] = _figure(metric(pooled), {key: metric(pixels) for key, pixels in with_masks.items()},
                                        with_masks)
        return figures

    def _by_class(self, metric: Callable[[Any, Any], float]) -> Dict[str, Any]:
        labels, scores, classes = np.array(self._labels), np.array(self._scores), np.array(self._classes)
        members = {name: classes == name for name in sorted(set(self._classes))}
        return _figure(metric(labels, scores), {
            name: metric(labels[images], scores[images])
            for name, images in members.items() if labels[images].any() and not labels[images].all()
        }, members)


def _figure(pooled: Any, per_class: Dict[str, Any], classes: Iterable[str]) -> Dict[str, Any]:
    """Only the ``classes`` in ``per_class`` have a value; ``""`` is not a class."""
    named = {name: value for name, value in per_class.items() if name}
    figure = {"pooled": rounded(pooled), "per_class": {name: rounded(value) for name, value in named.items()}}
    if named:
        return {"mean": rounded(sum(named.values()) / len(named)), **figure}
    return figure if any(classes) else {"mean": rounded(pooled), **figure}
