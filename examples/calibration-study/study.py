"""Quantize one detector in every way of the study and measure it; prints a JSON line for each, as it comes.

What the results file holds already is not measured again, so an interrupted study goes on where it stopped.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import unfused
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from uadtool.data.dataset import Sample, scoring_samples, training_samples
from uadtool.data.images import read_mask
from uadtool.data.splits import balanced
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.detectors.statistics import RawMaps, fit_statistics
from uadtool.lab.models import load_float_model
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.ptq import layers_outside, quantize
from uadtool.lab.quantization.qat import fine_tune
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.sources import calibration_batches
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.training.data import read_images, split_again
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Metadata
from uadtool.scoring.pixel_metrics import PixelMetrics

CALIBRATION_IMAGES = 64
QAT_STEPS = 60
SOURCES = ("good", "good+synthetic", "natural", "random-normal", "test")
METHODS = ("minmax", "percentile", "entropy", "mse")
GRIDS = ("full", "sources")
"""All questions of the study, or what to calibrate on, with which method, alone."""


@dataclass(frozen=True)
class Cell:
    """One way to quantize.

    ``procedure`` is float, ptq, corrected (ptq with bias correction), qat (from corrected) or first (quantize first,
    corrected). ``quantizers`` are after or before the activation, or before with per-tensor weights.
    """

    procedure: str
    source: str = "-"
    method: str = "-"
    scope: str = "all"
    quantizers: str = "after"


def cells(grid: str, with_first: bool) -> Iterator[Cell]:
    """The ways of a ``grid``, one of ``GRIDS``; full where it is cheap, elsewhere what answers questions."""
    yield Cell("float")
    if grid == "sources":
        for source, method in itertools.product(SOURCES, METHODS):
            yield Cell("ptq", source, method)
        for source in ("good", "random-normal"):
            yield Cell("corrected", source, "entropy")
        return
    for source, method, scope in itertools.product(SOURCES, METHODS, ("student", "all")):
        yield Cell("ptq", source, method, scope)
    for source, method in itertools.product(("good", "random-normal"), METHODS):
        yield Cell("corrected", source, method)
    if with_first:
        yield from (Cell("first", "good", method) for method in METHODS)
    for source, method, scope in itertools.product(SOURCES, ("minmax", "mse"), ("student", "all")):
        yield Cell("ptq", source, method, scope, "before")
    for source in SOURCES:
        yield Cell("ptq", source, "mse", "student", "before, per tensor")
    for source, method in (("good", "mse"), ("good", "entropy"), ("random-normal", "entropy")):
        yield Cell("qat", source, method)


class Study:
    """A detector, the images, and what is computed once for many cells."""

    def __init__(self, model: str, first: str | None, data: str, natural: str, seed: int) -> None:
        self.data, self.natural, self.seed = data, natural, seed
        self.detector, self.metadata = load_float_model(model)
        self.first = load_float_model(first)[0] if first else None
        self.samples = training_samples(data, self.metadata.classes)
        self.training, self.held_out = split_again(self.metadata, self.samples)
        self.test = [sample for sample in scoring_samples([data]) if sample.class_name in self.metadata.classes]
        self.images = {name: self._read(part) for name, part in (
            ("held_out", self.held_out), ("test", self.test),
            ("correction", balanced(self.training, CORRECTION_IMAGES, seed)))}
        self.masks = [self._mask(sample) for sample in self.test]
        self.ranges: dict[tuple[bool, str, str, bool], Ranges] = {}

    def measure(self, cell: Cell) -> dict[str, float]:
        """Mean and pooled image AUROC, pixel AUROC and AUPRO of the detector in ONNX Runtime, quantized so."""
        detector = self.first if cell.procedure == "first" else self.detector
        assert detector is not None
        target = "onnxruntime" if cell.quantizers == "after" else "openvino"  # which has the biases in float
        metadata = self.metadata.replace(precision="fp32" if cell.procedure == "float" else "int8", target=target)
        raw_maps = deployed_maps(self._quantized(cell, detector), metadata)
        return self._evaluate(detector, metadata, raw_maps)

    def _quantized(self, cell: Cell, detector: Detector) -> nn.Module:
        if cell.procedure == "float":
            return detector
        kept = layers_outside(detector, cell.scope)
        ranges = self._calibrate(cell, detector)
        target = TARGETS["onnxruntime"]
        if cell.quantizers != "after":
            return unfused.quantize(detector, ranges, replace(target, integer_bias=False), kept,
                                    per_tensor="per tensor" in cell.quantizers)
        correction = None if cell.procedure == "ptq" else self.images["correction"]
        if cell.procedure != "qat":
            return quantize(detector, ranges, target, kept, correction)
        good = self._read(balanced(self.held_out, 16, self.seed))
        anomalous = synthetic_anomalies(good.numpy(), good.numpy(), np.random.default_rng(self.seed))
        with TemporaryDirectory() as folder:
            tuned, learned = fine_tune(detector, ranges, target, kept, self.training, self.metadata.image_size,
                                       [good, torch.from_numpy(anomalous)], correction, QAT_STEPS, self.seed,
                                       Path(folder, "checkpoint"), {}, False)
        return quantize(tuned, learned, target, kept)

    def _calibrate(self, cell: Cell, detector: Detector) -> Ranges:
        key = detector is self.first, cell.source, cell.method, cell.quantizers == "after"
        if key not in self.ranges:
            sources = {"good+synthetic": ["good", "synthetic-anomalies"], "natural": [f"images:{self.natural}"],
                       "test": [f"images:{self.data}"]}.get(cell.source, [cell.source])
            batches, _ = calibration_batches(sources, self.samples, CALIBRATION_IMAGES, self.seed, detector,
                                             self.metadata.image_size)
            run = calibrate if cell.quantizers == "after" else unfused.calibrate
            self.ranges[key] = run(detector, batches, cell.method)
        return self.ranges[key]

    @torch.inference_mode()
    def _evaluate(self, detector: Detector, metadata: Metadata, raw_maps: RawMaps) -> dict[str, float]:
        detector = copy.deepcopy(detector)  # the statistics of one cell are not those of the next
        fit_statistics(detector, raw_maps, metadata.classes, self._batches("held_out", self.held_out))
        maps = [detector.normalize_maps(*raw_maps(images)) for _, images in self._batches("test", self.test)]
        scores = torch.cat([detector.image_score(part) for part in maps]).numpy()
        labels = np.array([sample.label != "good" for sample in self.test])
        names = np.array([sample.class_name for sample in self.test])
        pixels = {name: PixelMetrics() for name in metadata.classes}
        for sample, mask, one in zip(self.test, self.masks, torch.cat(maps)):
            if mask is not None:
                large = F.interpolate(one[None, None], size=mask.shape, mode="bilinear")[0, 0]
                pixels[str(sample.class_name)].update(large.numpy(), mask)
        return {
            "image_auroc": float(np.mean([roc_auc_score(labels[names == n], scores[names == n]) for n in pixels])),
            "pooled": float(roc_auc_score(labels, scores)),
            "pixel_auroc": _mean(part.auroc() for part in pixels.values()),
            "aupro": _mean(part.aupro() for part in pixels.values()),
        }

    def _batches(self, name: str, samples: list[Sample]) -> Iterator[tuple[list[Sample], Tensor]]:
        for start in range(0, len(samples), 32):
            yield samples[start:start + 32], self.images[name][start:start + 32]

    def _read(self, samples: list[Sample]) -> Tensor:
        return read_images(samples, self.metadata.image_size, available_cores())

    def _mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """At the size of the input; None where a defect has no mask."""
        size = self.metadata.image_size
        if sample.label == "good":
            return np.zeros(size, bool)
        return read_mask(sample.mask, size) if sample.mask else None


def _mean(values: Iterator[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def natural_images(folder: Path, count: int, size: int) -> None:
    """Crops of the two photographs that scikit-learn brings, a temple and a flower, as images of another domain."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    photographs = load_sample_images().images
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top, left = (int(random.integers(side - size + 1)) for side in photograph.shape[:2])
        Image.fromarray(photograph[top:top + size, left:left + size]).save(folder / f"{index:03}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a data set in MVTec layout")
    parser.add_argument("model", help="the float detector")
    parser.add_argument("results", type=Path, help="JSON Lines; new ones are appended")
    parser.add_argument("--first", help="the detector that was trained with --teacher-int8")
    parser.add_argument("--grid", choices=GRIDS, default="full", help="which ways to try")
    parser.add_argument("--name", required=True, help="of the detector in the results")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images")
    parser.add_argument("--natural", help="a folder of images of another domain")
    arguments = parser.parse_args()
    known = []
    if arguments.results.exists():
        known = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    with TemporaryDirectory() as folder:
        natural = arguments.natural or folder
        if not arguments.natural:
            natural_images(Path(folder), CALIBRATION_IMAGES, 256)
        study = None
        for cell in cells(arguments.grid, bool(arguments.first)):
            key = {"detector": arguments.name, "seed": arguments.seed, **asdict(cell)}
            if any(key.items() <= record.items() for record in known):
                continue
            study = study or Study(arguments.model, arguments.first, arguments.data, natural, arguments.seed)
            began = time.monotonic()
            record = {**key, **study.measure(cell), "seconds": round(time.monotonic() - began, 1)}
            with arguments.results.open("a") as results:
                results.write(f"{json.dumps(record)}\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
