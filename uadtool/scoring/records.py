"""Scoring images with an exported detector, and how well the scores agree with the labels that the folders tell."""

import logging
import time
from itertools import islice
from typing import Any, Callable, Dict, Generator, Iterable, Optional, Sequence, Tuple

import numpy as np

from uadtool import host
from uadtool.data.dataset import Sample
from uadtool.data.images import ImageError, upsample
from uadtool.errors import UadtoolError
from uadtool.runtimes.contract import Runtime, describe
from uadtool.scoring.cluster import Cluster
from uadtool.scoring.evaluation import Evaluation, rounded
from uadtool.scoring.predict import Prediction, predict_samples

SCHEMA = "uadtool.score/1"

log = logging.getLogger("uadtool")

Record = Dict[str, Any]
PerImage = Callable[[Record, np.ndarray, float], Record]
"""Makes something of an image: a picture, a copy."""


def score(
    runtime: Runtime,
    samples: Iterable[Sample],
    threshold: Optional[float] = None,
    batch_size: int = 1,
    outputs: Sequence[PerImage] = (),
    shard: Optional[Tuple[int, int]] = None,
    cluster: Optional[Cluster] = None,
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
    for sample, found in (cluster.predict if cluster else predict_samples)(runtime, samples, batch_size):
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


def evaluate(evaluation: Evaluation, sample: Sample, found: Prediction, size: Tuple[int, int]) -> None:
    """Count an image whose ``label`` is known, its map in ``size`` (height, width).

    The pixels of an anomalous one without a mask do not count, since nobody knows which of them are.
    """
    name, anomalous = sample.class_name or "", sample.label == "anomalous"
    evaluation.add(name, anomalous, found.score, found.raw_score)
    mask = found.mask if anomalous or found.mask is not None else np.zeros(size, bool)
    if mask is not None:
        evaluation.add_pixels(name, upsample(found.anomaly_map, size), mask)
