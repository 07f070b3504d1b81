"""Scoring images with an exported detector, and how well the scores agree with the labels that the folders tell."""

import time
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import numpy as np
from PIL import Image

from uadtool import host
from uadtool.dataset import Sample
from uadtool.errors import UadtoolError
from uadtool.evaluation import Evaluation, rounded
from uadtool.images import read_ahead, read_image, read_mask
from uadtool.metadata import Metadata
from uadtool.runtimes import Runtime, describe

SCHEMA = "uadtool.score/1"

MAX_READERS = 4
"""Threads that decode images while the detector runs; it has most of the work."""

Record = Dict[str, Any]
Content = Union[Tuple[np.ndarray, Optional[np.ndarray]], UadtoolError]
"""An image and its mask, or why they could not be read."""


class Prediction(NamedTuple):
    """What is known about one image; see ``uadtool.runtimes.Output`` for the units.

    ``anomaly_map`` is float32 [h, w], ``mask`` the ground truth, bool [H, W], if there is one. ``milliseconds`` is the
    inference time of its batch divided by the images in it.
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
    draw: Optional[Callable[[Record, np.ndarray, float], str]] = None,
) -> Generator[Record, None, None]:
    """Yield the records of a run (schemas/score.json): ``run``, an ``image`` as soon as it is known, ``summary``.

    ``threshold`` is the model's if None; an image above it is anomalous. What cannot be read becomes an ``image`` with
    ``error``. ``draw`` takes the record, the anomaly map and the threshold, and returns the path of the picture it
    made. Metrics come from the scores as they stand in the records, rounded to 6 digits.
    """
    threshold = runtime.metadata.threshold if threshold is None else threshold
    yield {"schema": SCHEMA, "type": "run", **host.opening(), **describe(runtime), "threshold": threshold}
    began = time.perf_counter()
    images = errors = anomalous = 0
    evaluation = Evaluation(threshold)
    labelled = False
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
        if draw:
            record["heatmap"] = draw(record, found.anomaly_map, threshold)
        yield record
        if sample.label:
            labelled = True
            evaluate(evaluation, sample, found, runtime.metadata.image_size)
    seconds = time.perf_counter() - began
    summary: Record = {
        "type": "summary",
        "images": images,
        "errors": errors,
        "anomalous": anomalous,
        "seconds": rounded(seconds),
        "images_per_second": rounded((images - errors) / seconds),
    }
    if labelled:
        summary.update(metrics=evaluation.figures(), pixels=evaluation.pixels())
    yield summary


def predict(
    runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1
) -> Iterator[Tuple[Sample, Union[Prediction, UadtoolError]]]:
    """Run the detector over ``samples``, in order, decoding ahead of it. What cannot be read comes as its error."""
    size = runtime.metadata.image_size

    def read(sample: Sample) -> Content:
        return read_image(sample.path, size), read_mask(sample.mask, size) if sample.mask else None

    readers = min(runtime.threads, MAX_READERS)
    for batch in _batches(read_ahead(read, samples, readers, readers + 2 * batch_size), batch_size):
        images = [content[0] for _, content in batch if not isinstance(content, UadtoolError)]
        if images:
            began = time.perf_counter()
            outputs = zip(*runtime.run(np.stack(images)))
            milliseconds = rounded(1000 * (time.perf_counter() - began) / len(images))
        for sample, content in batch:
            if isinstance(content, UadtoolError):
                yield sample, content
            else:
                yield sample, _prediction(runtime.metadata, sample, *next(outputs), content[1], milliseconds)


def evaluate(evaluation: Evaluation, sample: Sample, found: Prediction, size: Tuple[int, int]) -> None:
    """Count an image whose ``label`` is known, its map in ``size`` (height, width).

    The pixels of an anomalous one without a mask do not count, since nobody knows which of them are.
    """
    name, anomalous = sample.class_name or "", sample.label == "anomalous"
    evaluation.add(name, anomalous, found.score, found.raw_score)
    mask = found.mask if anomalous or found.mask is not None else np.zeros(size, bool)
    if mask is not None:
        evaluation.add_pixels(name, upsample(found.anomaly_map, size), mask)


def upsample(anomaly_map: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize a float32 map [h, w] to ``size`` (height, width) bilinearly, pixel centres aligned."""
    return np.asarray(Image.fromarray(anomaly_map).resize(size[::-1], Image.Resampling.BILINEAR))


def _batches(contents: Iterable[Tuple[Sample, Content]], size: int) -> Iterator[List[Tuple[Sample, Content]]]:
    """Groups of ``size`` images. What could not be read keeps its place, and waits only if an image does."""
    batch, images = [], 0
    for sample, content in contents:
        batch.append((sample, content))
        images += not isinstance(content, UadtoolError)
        if images in (0, size):
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _prediction(metadata: Metadata, sample: Sample, score: np.float32, raw_score: np.float32, anomaly_map: np.ndarray,
                nearest: np.int32, mask: Optional[np.ndarray], milliseconds: float) -> Union[Prediction, UadtoolError]:
    if not (np.isfinite(score) and np.isfinite(anomaly_map).all()):
        return UadtoolError(f"{sample.path}: the model gave a score that is not a finite number")
    return Prediction(rounded(score), rounded(raw_score), metadata.classes[nearest], anomaly_map, mask, milliseconds)
