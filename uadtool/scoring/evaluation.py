"""How well the scores and maps of a run agree with the labels and masks: the ``metrics`` object of its summary."""

from typing import Any, Callable, Dict, Iterable, List, Tuple

import numpy as np

from uadtool.scoring.metrics import auroc, average_precision, f1_max, rounded
from uadtool.scoring.pixel_metrics import PixelCounts, PixelMetrics

IMAGE_METRICS: Dict[str, Callable[[Any, Any], float]] = {
    "image_auroc": auroc, "average_precision": average_precision,
    "f1_max": lambda labels, scores: f1_max(labels, scores)[0],
}


class Evaluation:
    """Detection figures of labelled images, which are added one by one, in any order.

    A class is identified by its name, or by ``""`` if it is unknown.
    """

    def __init__(self) -> None:
        self._images: List[Tuple[str, bool, float, float, bool]] = []
        self._pixels: Dict[str, PixelMetrics] = {}

    def add(self, class_name: str, anomalous: bool, score: float, raw_score: float, above: bool) -> None:
        """Count an image; ``anomalous`` is its label, ``above`` whether its score exceeds its threshold."""
        self._images.append((class_name, anomalous, score, raw_score, above))

    def add_pixels(self, class_name: str, pixels: PixelCounts) -> None:
        """Add the pixels of an image; see ``count_pixels``."""
        self._pixels.setdefault(class_name, PixelMetrics()).add(pixels)

    def pixels(self) -> Dict[str, Dict[str, Any]]:
        """The pixels counted so far, by class; see ``PixelMetrics.to_json``."""
        return {name: pixels.to_json() for name, pixels in sorted(self._pixels.items())}

    def merge_pixels(self, counted: Dict[str, Dict[str, Any]]) -> None:
        """Add the ``pixels`` of another run.

        Raises:
            ValueError: they cannot be read, or belong to a class without images.
        """
        unknown = counted.keys() - {class_name for class_name, *_ in self._images}
        if unknown:
            raise ValueError(f"it counts pixels of {min(unknown)!r:.80} and no images")
        for name, pixels in counted.items():
            self._pixels.setdefault(name, PixelMetrics()).merge(PixelMetrics.from_json(pixels))

    def figures(self) -> Dict[str, Any]:
        """The ``metrics`` object of the summary, as far as the labels and masks allow.

        Each figure has its value over all images in one list, or all pixels of classes with masks (``pooled``), for
        each class with the labels that it requires (``per_class``), and their ``mean``. Without any class names, the
        mean is the pooled value.
        """
        if not self._images:
            return {}
        classes, labels, scores, raw_scores, above = map(np.array, zip(*self._images))
        members = {name: classes == name for name in sorted({name for name, *_ in self._images})}
        figures: Dict[str, Any] = {}
        if labels.any() and not labels.all():
            for name, metric in IMAGE_METRICS.items():
                figures[name] = _figure(metric(labels, scores), {
                    class_name: metric(labels[images], scores[images]) for class_name, images in members.items()
                    if labels[images].any() and not labels[images].all()}, members)
            figures["image_auroc"]["pooled_raw"] = rounded(auroc(labels.tolist(), raw_scores.tolist()))
        for name, images in (("false_positive_rate", ~labels), ("recall", labels)):
            if images.any():
                figures[name] = _figure(np.mean(above[images]), {
                    class_name: np.mean(above[images & its_images]) for class_name, its_images in members.items()
                    if (images & its_images).any()}, members)
        with_masks = {name: pixels for name, pixels in sorted(self._pixels.items()) if pixels.auroc() is not None}
        if with_masks:
            pooled = PixelMetrics()
            for pixels in with_masks.values():
                pooled.merge(pixels)
            for name, pixel_metric in (("pixel_auroc", PixelMetrics.auroc), ("aupro", PixelMetrics.aupro)):
                per_class = {class_name: pixel_metric(pixels) for class_name, pixels in with_masks.items()}
                figures[name] = _figure(pixel_metric(pooled), per_class, with_masks)
        return figures


def _figure(pooled: Any, per_class: Dict[str, Any], classes: Iterable[str]) -> Dict[str, Any]:
    """Only the ``classes`` in ``per_class`` have a value; ``""`` is not a class."""
    named = {name: value for name, value in per_class.items() if name}
    figure = {"pooled": rounded(pooled), "per_class": {name: rounded(value) for name, value in named.items()}}
    if named:
        return {"mean": rounded(sum(named.values()) / len(named)), **figure}
    return figure if any(classes) else {"mean": rounded(pooled), **figure}
