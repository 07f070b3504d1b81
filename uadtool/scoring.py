"""Scoring images with an exported detector, and how well the scores agree with the labels that the folders tell."""

import time
from itertools import islice
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
from PIL import Image

from uadtool import host
from uadtool.dataset import Sample
from uadtool.errors import UadtoolError
from uadtool.images import read_ahead, read_image, read_mask
from uadtool.metadata import Metadata
from uadtool.runtimes import Runtime, describe

if TYPE_CHECKING:
    from uadtool.metrics import PixelMetrics

SCHEMA = "uadtool.score/1"

Record = Dict[str, Any]
PerImage = Callable[[Record, np.ndarray, float], Record]
"""Makes something of an image: a picture, a copy."""


class Prediction(NamedTuple):
    """What is known about one image; see ``uadtool.runtimes.Output`` for the units.

    ``anomaly_map`` is float32 [h, w], ``mask`` the ground truth, bool [H, W], if there is one. ``milliseconds`` is the
    inference time of its batch, beside those of other streams, divided by the images in it.
    """

    score: float
    raw_score: float
    nearest_class: str
    anomaly_map: np.ndarray
    mask: Optional[np.ndarray]
    milliseconds: float


def score(
    runtime: Runtime,
    samples: Iterable[Sample],
    threshold: Optional[float] = None,
    batch_size: int = 1,
    outputs: Sequence[PerImage] = (),
) -> Generator[Record, None, None]:
    """Yield the records of a run (schemas/score.json): ``run``, an ``image`` as soon as it is known, ``summary``.

    ``threshold`` is the model's if None; an image above it is anomalous. What cannot be read becomes an ``image`` with
    ``error``. ``outputs`` are called with each record, its anomaly map, float32 [h, w], and the threshold; what they
    return joins the record. Metrics come from the scores as they stand in the records, rounded to 6 digits.
    """
    threshold = runtime.metadata.threshold if threshold is None else threshold
    yield {"schema": SCHEMA, "type": "run", **host.opening(), **describe(runtime), "threshold": threshold}
    began = time.perf_counter()
    images = errors = anomalous = 0
    evaluation = Evaluation(threshold, runtime.metadata.image_size)
    for sample, found in predict(runtime, samples, batch_size):
        images += 1
        if isinstance(found, UadtoolError):
            errors += 1
            yield {"type": "image", "path": sample.path, "error": str(found)}
            continue
        record = {
            "type": "image",
            "path": sample.path,
            "score": found.score,
            "raw_score": found.raw_score,
            "anomalous": found.score > threshold,
            "nearest_class": found.nearest_class,
            "class": sample.class_name,
            "label": sample.label,
            "milliseconds": found.milliseconds,
        }
        record = {key: value for key, value in record.items() if value is not None}
        anomalous += found.score > threshold
        for output in outputs:
            record.update(output(record, found.anomaly_map, threshold))
        yield record
        if sample.label:
            evaluation.add(sample, found)
    seconds = time.perf_counter() - began
    summary: Record = {
        "type": "summary",
        "images": images,
        "errors": errors,
        "anomalous": anomalous,
        "seconds": _round(seconds),
        "images_per_second": _round((images - errors) / seconds),
    }
    metrics = evaluation.figures()
    yield {**summary, "metrics": metrics} if metrics else summary


def predict(
    runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1
) -> Iterator[Tuple[Sample, Union[Prediction, UadtoolError]]]:
    """Run the detector over ``samples``, in order. What cannot be read comes as its error.

    As many threads as the runtime has ``streams``, but at least two, each decode a batch and run it.
    """
    size = runtime.metadata.image_size

    def read(sample: Sample) -> Union[Tuple[np.ndarray, Optional[np.ndarray]], UadtoolError]:
        try:
            return read_image(sample.path, size), read_mask(sample.mask, size) if sample.mask else None
        except UadtoolError as error:
            return error

    def run(batch: List[Sample]) -> List[Union[Prediction, UadtoolError]]:
        contents = [read(sample) for sample in batch]
        images = [content[0] for content in contents if not isinstance(content, UadtoolError)]
        if images:
            began = time.perf_counter()
            outputs = zip(*runtime.run(np.stack(images)))
            milliseconds = _round(1000 * (time.perf_counter() - began) / len(images))
        return [content if isinstance(content, UadtoolError)
                else _prediction(runtime.metadata, sample, *next(outputs), content[1], milliseconds)
                for sample, content in zip(batch, contents)]

    source, workers = iter(samples), max(2, runtime.streams)
    batches: Iterator[List[Sample]] = iter(lambda: list(islice(source, batch_size)), [])
    for batch, found in read_ahead(run, batches, workers, 2 * workers):
        if isinstance(found, UadtoolError):  # not of an image: the runtime failed
            raise found
        yield from zip(batch, found)


class Evaluation:
    """Detection figures of labelled images, gathered image by image."""

    def __init__(self, threshold: float, image_size: Tuple[int, int]) -> None:
        self._threshold = threshold
        self._image_size = image_size
        self._classes: List[str] = []
        self._labels: List[bool] = []
        self._scores: List[float] = []
        self._raw_scores: List[float] = []
        self._pixels: Dict[str, "PixelMetrics"] = {}

    def add(self, sample: Sample, found: Prediction) -> None:
        """Count an image whose ``label`` is known. An anomalous one without a mask counts for the image only."""
        name, anomalous = sample.class_name or "", sample.label == "anomalous"
        self._classes.append(name)
        self._labels.append(anomalous)
        self._scores.append(found.score)
        self._raw_scores.append(found.raw_score)
        mask = found.mask
        if mask is None and not anomalous:
            mask = np.zeros(self._image_size, bool)
        if mask is not None:
            from uadtool.metrics import PixelMetrics

            pixels = self._pixels.setdefault(name, PixelMetrics())
            pixels.update(upsample(found.anomaly_map, self._image_size), mask)

    def figures(self) -> Record:
        """The ``metrics`` object of the summary: what the labels and masks seen suffice for.

        Each figure has its value over all images in one list (``pooled``), for each class that has both labels
        (``per_class``), and their ``mean``, which is the pooled value when no class is known.
        """
        labels, scores = np.array(self._labels, bool), np.array(self._scores)
        found: Record = {}
        if labels.any() and not labels.all():
            from uadtool import metrics

            raw = self._images(metrics.auroc, np.array(self._raw_scores))
            found["image_auroc"] = {**self._images(metrics.auroc, scores), "pooled_raw": raw["pooled"]}
            found["average_precision"] = self._images(metrics.average_precision, scores)
            found["f1_max"] = self._images(lambda labels, scores: metrics.f1_max(labels, scores)[0], scores)
        for name, chosen in (("false_positive_rate", ~labels), ("recall", labels)):
            if chosen.any():
                found[name] = _round(np.mean(scores[chosen] > self._threshold))
        with_masks = {name: pixels for name, pixels in self._pixels.items() if pixels.auroc() is not None}
        if with_masks:
            from uadtool.metrics import PixelMetrics

            pooled = PixelMetrics()
            for pixels in with_masks.values():
                pooled.merge(pixels)
            for name, figure in (("pixel_auroc", PixelMetrics.auroc), ("aupro", PixelMetrics.aupro)):
                found[name] = _figures(figure(pooled), {key: figure(pixels) for key, pixels in with_masks.items()})
        return found

    def _images(self, figure: Callable[[Any, Any], float], scores: np.ndarray) -> Record:
        labels, classes = np.array(self._labels), np.array(self._classes)
        members = {name: classes == name for name in sorted(set(self._classes))}
        return _figures(figure(labels, scores), {
            name: figure(labels[chosen], scores[chosen])
            for name, chosen in members.items() if labels[chosen].any() and not labels[chosen].all()
        })


def upsample(anomaly_map: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize a float32 map [h, w] to ``size`` (height, width) bilinearly, pixel centres aligned."""
    return np.asarray(Image.fromarray(anomaly_map).resize(size[::-1], Image.Resampling.BILINEAR))


def _prediction(metadata: Metadata, sample: Sample, score: np.float32, raw_score: np.float32, anomaly_map: np.ndarray,
                nearest: np.int32, mask: Optional[np.ndarray], milliseconds: float) -> Union[Prediction, UadtoolError]:
    if not (np.isfinite(score) and np.isfinite(anomaly_map).all()):
        return UadtoolError(f"{sample.path}: the model gave a score that is not a finite number")
    return Prediction(_round(score), _round(raw_score), metadata.classes[nearest], anomaly_map, mask, milliseconds)


def _figures(pooled: Any, per_class: Dict[str, Any]) -> Record:
    named = {name: value for name, value in per_class.items() if name}
    mean = sum(named.values()) / len(named) if named else pooled
    return {
        "mean": _round(mean),
        "pooled": _round(pooled),
        "per_class": {name: _round(value) for name, value in named.items()},
    }


def _round(value: Any) -> float:
    return float(f"{value:.6g}")
