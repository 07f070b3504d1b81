"""Calibration as a step: from a float model and calibration images to a file of activation ranges."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from uadtool import __version__
from uadtool.data.dataset import training_samples
from uadtool.data.inspection import is_faint, warn_of_faint
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.quantization.calibration import calibrate as observed_ranges
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ranges import RangesFile
from uadtool.lab.quantization.sources import calibration_batches
from uadtool.lab.training.data import calibration_images
from uadtool.metadata import Metadata
from uadtool.progress import Progress


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of ``uadtool calibrate``.

    ``sources`` are described in ``quantization.sources``; they share ``count`` images. ``classes`` limits the data set
    to these classes; None takes the classes of the model. ``percentile`` is for the method ``percentile``.
    """

    method: str = "mse"
    percentile: float = 99.99
    sources: Sequence[str] = ("good",)
    count: int = 64
    classes: Optional[Sequence[str]] = None
    seed: int = 0


def calibrate(detector: Detector, metadata: Metadata, digest: str, data: Optional[str],
              options: CalibrationOptions) -> RangesFile:
    """Record the activation ranges of a float detector.

    Args:
        digest: of the detector's file.
        data: the data set for the sources ``good`` and ``synthetic-anomalies``; None without them.

    Raises:
        UadtoolError: as ``training_samples`` and ``calibration_batches``.
    """
    good = calibration_images(metadata, training_samples(data, options.classes or metadata.classes)) if data else []
    unread, source = calibration_batches(options.sources, good, options.count, options.seed, detector,
                                         metadata.reading)
    with Progress("calibrate", source["count"]) as progress:
        def batches() -> Iterator[Tensor]:
            faint = 0
            for images in unread:
                yield images
                faint += sum(map(is_faint, images.numpy())) if images.dtype == torch.uint8 else 0
                progress.update(len(images))
            warn_of_faint(faint, progress.count)

        ranges = observed_ranges(QuantizationPlan(detector), batches(), options.method, options.percentile)
    percentile = f"-{options.percentile:.10g}" if options.method == "percentile" else ""
    return RangesFile(model_digest=digest, method=f"{options.method}{percentile}", source=source, ranges=ranges,
                      tool=f"uadtool {__version__}")
