"""Scoring images with an exported detector, and how well the scores agree with the labels of the images."""
import functools
import time
from itertools import islice
from typing import Any, Callable, Dict, Generator, Iterable, Optional, Sequence, Tuple

import numpy as np

from uadtool import host
from uadtool.data.images import ImageError
from uadtool.data.inspection import warn_of_faint
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.runtimes.contract import Runtime, describe
from uadtool.scoring.cluster import Cluster
from uadtool.scoring.drift import Drift
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.metrics import rounded
from uadtool.scoring.predict import Prediction, Predictions, predict_samples
from uadtool.scoring.thresholds import Thresholds
from uadtool.terminal import first_of, log

SCHEMA = "uadtool.score/1"


Record = Dict[str, Any]
Output = Callable[[Record, np.ndarray], Record]
"""Writes a file about an image; see ``score``."""


def score(runtime: Runtime, samples: Iterable[Sample], thresholds: Optional[Thresholds] = None, batch_size: int = 1,
          outputs: Sequence[Output] = (), shard: Optional[Tuple[int, int]] = None, cluster: Optional[Cluster] = None,
          workers: Optional[int] = None, drift: Optional[Drift] = None) -> Generator[Record, None, None]:
    """Yield the records of a run (schemas/score.json): ``run``, each ``image`` as soon as it is known, ``summary``.

    An image that cannot be read becomes an ``image`` with ``error``. Metrics come from the scores in the records, which
    are rounded to 6 digits.

    Args:
        thresholds: images that score above that of their nearest class are anomalous; the model's if None.
        outputs: are called with each record and its anomaly map, float32 [h, w]. What they return joins the record.
        shard: (I, N) scores only every N-th sample, from the I-th (1 to N) on.
        cluster: does the work instead of this machine.
        workers: as for ``predict_samples``.
        drift: watches the images; a ``drift`` record follows the image that raises an alarm.
    """
    thresholds = thresholds or Thresholds.of_model(runtime.metadata)
    run: Record = {"schema": SCHEMA, "type": "run", **host.opening(), **describe(runtime),
                   "threshold": thresholds.common}
    if thresholds.by_class:
        run["thresholds"] = dict(thresholds.by_class)
    if runtime.metadata.held_out and thresholds.rate is not None:
        run["held_out"] = {"false_positive_rate": thresholds.rate, "scores": runtime.metadata.held_out}
    if shard:
        run["shard"] = {"index": shard[0], "count": shard[1]}
        samples = islice(samples, shard[0] - 1, None, shard[1])
    if cluster:
        run["cluster"] = cluster.size()
    yield run
    on_this_machine = functools.partial(predict_samples, workers=workers)
    predict: Callable[..., Predictions] = cluster.predict if cluster else on_this_machine
    began = time.perf_counter()
    images = errors = anomalous = unknown = unnamed = faint = 0
    evaluation, classes = Evaluation(), set(runtime.metadata.classes)
    # ``unnamed`` counts those unknown images whose class the data do not name, ``others`` those of classes that the
    # model does not have.
    others: Dict[str, int] = {}
    for sample, prediction in predict(runtime, samples, batch_size, pixels=True):
        images += 1
        if isinstance(prediction, UadtoolError):
            errors += 1
            yield {**_opening(sample), "error": str(prediction)}
            continue
        record = _image_record(sample, prediction, thresholds)
        anomalous += record["anomalous"]
        unknown += prediction.unknown_class is True
        unnamed += prediction.unknown_class is True and not sample.class_name
        faint += prediction.faint
        for output in outputs:
            try:
                record.update(output(record, prediction.anomaly_map))
            except ImageError as error:  # the image was deleted after it was read
                log.warning("%s", error)
        yield record
        if drift and (alarm := drift.add(sample.path, prediction.nearest_class, prediction.class_distance)):
            yield alarm
        if sample.label:
            evaluate(evaluation, record, prediction)
        if sample.class_name and sample.class_name not in classes:
            others[sample.class_name] = others.get(sample.class_name, 0) + 1
    seconds = time.perf_counter() - began
    warn_of_faint(faint, images)
    if others:
        log.warning("%d of %d images are of classes that the model was not trained on (%s); it scores them as the "
                    "class that they look most like", sum(others.values()), images,
                    first_of(sorted(others), "classes"))
    if unnamed:
        log.warning("%d of %d images look like no class that the model was trained on (unknown_class); it scores them "
                    "as the class that they look most like", unnamed, images)
    metrics = evaluation.figures()
    yield {"type": "summary", "images": images, "errors": errors, "anomalous": anomalous, "seconds": rounded(seconds),
           "images_per_second": rounded((images - errors) / seconds),
           **({"drift": drift.alarms} if drift and drift.alarms else {}),
           **({"unknown_class": unknown} if unknown else {}), **({"faint": faint} if faint else {}),
           **({"metrics": metrics, "pixels": evaluation.pixels()} if metrics else {})}


def _image_record(sample: Sample, prediction: Prediction, thresholds: Thresholds) -> Record:
    score, name = prediction.score, prediction.nearest_class
    threshold = thresholds.of(name)
    record = {**_opening(sample), "score": score, "raw_score": prediction.raw_score, "threshold": threshold,
              "anomalous": score > threshold, "p_value": thresholds.p_value(score, name), "nearest_class": name,
              "class_distance": prediction.class_distance, "unknown_class": prediction.unknown_class,
              "class": sample.class_name, "label": sample.label, "milliseconds": prediction.milliseconds}
    return {key: value for key, value in record.items() if value is not None}


def _opening(sample: Sample) -> Record:
    record = {"type": "image", "path": sample.path, "frame": sample.frame, "arrived": sample.arrived,
              "time": host.now_exactly()}
    return {key: value for key, value in record.items() if value is not None}


def evaluate(evaluation: Evaluation, record: Record, prediction: Prediction) -> None:
    """Count a labelled image by its record, and its ``pixels`` if they were counted."""
    name = record.get("class", "")
    evaluation.add(name, record["label"] == "anomalous", record["score"], record["raw_score"], record["anomalous"])
    if isinstance(prediction.mask, UadtoolError):
        log.warning("%s; %s does not count in pixel metrics", prediction.mask, record["path"])
    elif prediction.pixels:
        evaluation.add_pixels(name, prediction.pixels)
