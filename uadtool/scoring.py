"""Scoring images with an exported detector, and how well the scores agree with the labels that the folders tell."""

import logging
import threading
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
from uadtool.evaluation import Evaluation, rounded
from uadtool.images import ImageError, read_ahead, read_image, read_mask
from uadtool.metadata import Metadata
from uadtool.runtimes import Runtime, describe

if TYPE_CHECKING:
    from uadtool.cluster import Cluster

SCHEMA = "uadtool.score/1"

log = logging.getLogger("uadtool")

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
    shard: Optional[Tuple[int, int]] = None,
    cluster: Optional["Cluster"] = None,
) -> Generator[Record, None, None]:
    """Yield the records of a run (schemas/score.json): ``run``, an ``image`` as soon as it is known, ``summary``.

    ``threshold`` is the model's if None; an image above it is anomalous. What cannot be read becomes an ``image`` with
    ``error``. ``outputs`` are called with each record, its anomaly map, float32 [h, w], and the threshold; what they
    return joins the record. Metrics come from the scores as they stand in the records, rounded to 6 digits.

    ``shard`` (I, N) scores of the samples each N-th alone, from the I-th (of 1 to N) on. ``cluster`` does the work
    instead of this machine.
    """
    threshold = runtime.metadata.threshold if threshold is None else threshold
    run: Record = {"schema": SCHEMA, "type": "run", **host.opening(), **describe(runtime), "threshold": threshold}
    if shard:
        run["shard"] = {"index": shard[0], "count": shard[1]}
        samples = islice(samples, shard[0] - 1, None, shard[1])
    if cluster:
        run["cluster"] = cluster.size()
    yield run
    began = time.perf_counter()
    images = errors = anomalous = 0
    evaluation = Evaluation(threshold)
    for sample, found in (cluster.predict if cluster else predict)(runtime, samples, batch_size):
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
            try:
                record.update(output(record, found.anomaly_map, threshold))
            except ImageError as error:  # it was there a moment ago
                log.warning("%s", error)
        yield record
        if sample.label:
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
    metrics = evaluation.figures()
    yield {**summary, "metrics": metrics, "pixels": evaluation.pixels()} if metrics else summary


def predict(
    runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1
) -> Iterator[Tuple[Sample, Union[Prediction, UadtoolError]]]:
    """Run the detector over ``samples``, in order. What cannot be read comes as its error.

    As many threads as cores, but at least two, each decode a batch and run it; as many as ``streams`` run at once.
    """
    size = runtime.metadata.image_size
    running = threading.Semaphore(runtime.streams)

    def read(sample: Sample) -> Union[Tuple[np.ndarray, Optional[np.ndarray]], UadtoolError]:
        if sample.problem:
            return UadtoolError(sample.problem)
        try:
            return read_image(sample.path, size), read_mask(sample.mask, size) if sample.mask else None
        except UadtoolError as error:
            return error

    def run(batch: List[Sample]) -> List[Union[Prediction, UadtoolError]]:
        contents = [read(sample) for sample in batch]
        images = [content[0] for content in contents if not isinstance(content, UadtoolError)]
        if images:
            stacked = np.stack(images)
            with running:
                began = time.perf_counter()
                outputs = zip(*runtime.run(stacked))
                milliseconds = rounded(1000 * (time.perf_counter() - began) / len(images))
        return [content if isinstance(content, UadtoolError)
                else _prediction(runtime.metadata, sample, *next(outputs), content[1], milliseconds)
                for sample, content in zip(batch, contents)]

    source, workers = iter(samples), max(2, runtime.threads)
    batches: Iterator[List[Sample]] = iter(lambda: list(islice(source, batch_size)), [])
    for batch, found in read_ahead(run, batches, workers, 2 * workers):
        if isinstance(found, UadtoolError):  # not of an image: the runtime failed
            raise found
        yield from zip(batch, found)


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


def _prediction(metadata: Metadata, sample: Sample, score: np.float32, raw_score: np.float32, anomaly_map: np.ndarray,
                nearest: np.int32, mask: Optional[np.ndarray], milliseconds: float) -> Union[Prediction, UadtoolError]:
    if not (np.isfinite([score, raw_score]).all() and np.isfinite(anomaly_map).all()):
        return UadtoolError(f"{sample.path}: the model gave a score that is not a finite number")
    if not 0 <= nearest < len(metadata.classes):
        return UadtoolError(f"{sample.path}: the model gave class {nearest} of {len(metadata.classes)}")
    return Prediction(rounded(score), rounded(raw_score), metadata.classes[nearest], anomaly_map, mask, milliseconds)
