"""Images in, predictions out: the detector over samples, in threads."""

import os
import threading
import time
from itertools import islice
from typing import Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image, read_masks
from uadtool.data.inspection import is_faint
from uadtool.data.read_ahead import read_ahead
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import Runtime
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.metrics import rounded
from uadtool.scoring.pixel_metrics import PixelCounts, count_pixels
from uadtool.scoring.thresholds import Thresholds

Mask = Union[np.ndarray, UadtoolError, None]


class Prediction(NamedTuple):
    """The result for one image; see ``uadtool.runtimes.contract.Output`` for the units.

    ``anomaly_map`` is float32 [h, w]; ``mask`` is the ground truth, bool [H, W], if it is known, or the error of a mask
    that cannot be read. The image is anomalous if its score exceeds ``threshold``, the model's for this class.
    ``milliseconds`` is the inference time of the batch, which may share the cores with other streams, divided by the
    images in it. ``class_distance`` is that to the nearest class; if it is above the model's limit, the image is of an
    ``unknown_class``, and its score means little. Both are None if the model has no limit. ``faint`` is whether the
    image shows nearly nothing. ``pixels`` are set by ``with_pixels``.
    """

    score: float
    raw_score: float
    nearest_class: str
    anomaly_map: np.ndarray
    mask: Mask
    threshold: float
    milliseconds: float
    class_distance: Optional[float] = None
    unknown_class: Optional[bool] = None
    faint: bool = False
    pixels: Optional[PixelCounts] = None

    @property
    def anomalous(self) -> bool:
        """The verdict: whether the score exceeds the threshold."""
        return self.score > self.threshold


Predictions = Iterator[Tuple[Sample, Union[Prediction, UadtoolError]]]
"""Each image with its prediction, or with the error of an image that cannot be read."""


def predict(runtime: Runtime, paths: Union[str, Iterable[str]], batch_size: int = 1) -> Predictions:
    """Run a detector over one or several paths: images, folders, data sets and manifests.

    Args:
        runtime: the detector, from ``uadtool.open_model``.
        paths: also ``pathlib.Path`` objects. They are read ahead, in threads.
        batch_size: images per inference.

    Yields:
        Each image (its ``path``, and ``class_name`` and ``label`` if known) with its ``Prediction``. An image that
        cannot be read comes with its ``UadtoolError`` instead.

    Raises:
        UadtoolError: a path holds no images.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return predict_samples(runtime, scoring_samples(map(os.fspath, names)), batch_size)


def predict_samples(runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1, pixels: bool = False,
                    workers: Optional[int] = None) -> Predictions:
    """Run a detector over ``samples``, in order. An image that cannot be read comes with its error.

    So many ``workers`` (None: one for each core, but at least two) each take a batch, decode it, run it and, if
    ``pixels``, count the pixels of its labelled images. At most ``runtime.streams`` batches run at once.
    """
    running = threading.Semaphore(runtime.streams)

    def read(sample: Sample) -> Union[Tuple[np.ndarray, Mask], UadtoolError]:
        if sample.problem:
            return UadtoolError(sample.problem)
        try:
            image = read_image(sample.path, *runtime.metadata.reading)
        except UadtoolError as error:
            return error
        try:
            return image, read_masks(sample.masks, runtime.metadata.image_size) if sample.masks else None
        except UadtoolError as error:
            return image, error

    def run(batch: List[Sample]) -> List[Union[Prediction, UadtoolError]]:
        contents = [read(sample) for sample in batch]
        images = [content[0] for content in contents if not isinstance(content, UadtoolError)]
        if images:
            stacked = np.stack(images)
            with running:
                began = time.perf_counter()
                outputs = zip(*runtime.run(stacked))
                milliseconds = rounded(1000 * (time.perf_counter() - began) / len(images))
        results = [content if isinstance(content, UadtoolError)
                   else _prediction(runtime.metadata, sample, *next(outputs), content, milliseconds)
                   for sample, content in zip(batch, contents)]
        return [with_pixels(result, sample, runtime.metadata.image_size)
                if pixels and isinstance(result, Prediction) else result for sample, result in zip(batch, results)]

    source, workers = iter(samples), workers or max(2, runtime.threads)
    batches: Iterator[List[Sample]] = iter(lambda: list(islice(source, batch_size)), [])
    for batch, results in read_ahead(run, batches, workers, 2 * workers):
        if isinstance(results, UadtoolError):  # the runtime failed
            raise results
        yield from zip(batch, results)


def with_pixels(prediction: Prediction, sample: Sample, size: Tuple[int, int]) -> Prediction:
    """The prediction with the ``pixels`` of its map, resized to ``size`` (height, width), if ``sample`` has a label.

    The pixels of an anomalous image without a readable mask are not counted: their labels are unknown.
    """
    mask = prediction.mask
    if mask is None and sample.label == "good":
        mask = np.zeros(size, bool)
    if not sample.label or not isinstance(mask, np.ndarray):
        return prediction
    return prediction._replace(pixels=count_pixels(upsample(prediction.anomaly_map, size), mask))


def _prediction(metadata: Metadata, sample: Sample, score: np.float32, raw_score: np.float32, anomaly_map: np.ndarray,
                nearest: np.int32, class_distance: np.float32, content: Tuple[np.ndarray, Mask], milliseconds: float
                ) -> Union[Prediction, UadtoolError]:
    limit = metadata.class_distance_limit
    if not (np.isfinite([score, raw_score]).all() and np.isfinite(anomaly_map).all()
            and (limit is None or np.isfinite(class_distance))):
        return UadtoolError(f"{sample.path}: the model gave a score that is not a finite number")
    if not 0 <= nearest < len(metadata.classes):
        return UadtoolError(f"{sample.path}: the model gave class {nearest} of {len(metadata.classes)}")
    name = metadata.classes[nearest]
    distance = unknown = None
    if limit is not None:
        distance = rounded(class_distance)
        unknown = distance > limit
    return Prediction(rounded(score), rounded(raw_score), name, anomaly_map, content[1],
                      Thresholds.of_model(metadata).of(name), milliseconds, distance, unknown, is_faint(content[0]))
