"""Calibration sources: the images from which activation ranges are recorded.

``good``                 good training images, the same number of each class
``synthetic-anomalies``  the same images with synthetic anomalies, for the ranges of anomalous features
``random-normal``        standard normal values in place of normalised pixels (as in arXiv 2407.02968), without images
``images:PATH``          a folder, an image, or the test split of a data set or manifest, for instance another domain
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uadtool.data.dataset import scoring_samples
from uadtool.data.samples import Sample
from uadtool.data.splits import balanced
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.training.data import CHUNK, image_batches
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Reading


def calibration_batches(sources: Sequence[str], good: Sequence[Sample], count: int, seed: int, detector: Detector,
                        reading: Reading) -> tuple[Iterator[Tensor], dict[str, Any]]:
    """Choose ``count`` calibration images, divided evenly among the sources; the first sources take the remainder.

    Args:
        sources: each as above.
        good: the images for ``good`` and ``synthetic-anomalies``; may be empty without them.
        detector: the detector to calibrate; its normalisation defines the random pixels.

    Returns:
        The batches and their record for the ranges file. Batches are read one at a time, source after source, each of
        at most 32 images [N, H, W, 3]: uint8, or float32 beyond 0..255 for ``random-normal``. A source with too few
        images gives all that it has.

    Raises:
        UadtoolError: a path has no images, or (while the batches are read) an image cannot be read.
    """
    records: list[dict[str, Any]] = []
    batches: list[Iterator[Tensor]] = []
    for place, source in enumerate(sources):
        share = len(range(place, count, len(sources)))
        if source == "random-normal":
            records.append({"kind": source, "count": share})
            batches.append(_random_normal(detector, share, reading.size, seed))
            continue
        kind, _, path = source.partition(":")
        samples = balanced(_images(path) if kind == "images" else good, share, seed)
        records.append({"kind": source, "count": len(samples), "images": list_digest(s.path for s in samples)})
        images = (batch for _, batch in image_batches(samples, reading, available_cores()))
        batches.append(_with_anomalies(images, seed) if kind == "synthetic-anomalies" else images)
    record = {"kind": "+".join(sources), "count": sum(part["count"] for part in records), "seed": seed,
              "parts": records}
    return chain.from_iterable(batches), record


def _images(path: str) -> list[Sample]:
    try:
        return list(scoring_samples([path]))
    except UadtoolError as error:
        raise UadtoolError(f"cannot calibrate on images:{path}: {error}; give an image, a folder with images, or a "
                           "data set with a test split") from error


def _with_anomalies(batches: Iterator[Tensor], seed: int) -> Iterator[Tensor]:
    """Each image with synthetic anomalies, taken from the images of its batch."""
    generator = np.random.default_rng(seed)
    for batch in batches:
        images = batch.numpy()
        yield torch.from_numpy(synthetic_anomalies(images, images, generator))


def _random_normal(detector: Detector, count: int, image_size: tuple[int, int], seed: int) -> Iterator[Tensor]:
    """Pixels that the detector's normalisation turns into standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, CHUNK):
        values = torch.randn(min(CHUNK, count - start), 3, *image_size, generator=generator)
        yield (values / detector.pixel_scale + detector.pixel_mean).permute(0, 2, 3, 1)
