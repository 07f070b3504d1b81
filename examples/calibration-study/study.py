"""Quantize one detector in every way of the study and measure it; prints a JSON line for each.

Ways that are already in the results file are skipped, so an interrupted study continues where it stopped.
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
from torch import Tensor, nn

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.images import read_masks
from uadtool.data.samples import Sample
from uadtool.data.splits import balanced
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.detectors.statistics import RawMaps, fit_statistics
from uadtool.lab.models import load_float_model
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES, BiasCorrection
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.qat import fine_tune
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.sources import calibration_batches
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.training.data import read_images, split_again
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Metadata
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.evaluation import Evaluation
from uadtool.scoring.pixel_metrics import count_pixels

CALIBRATION_IMAGES = 64
QAT_STEPS = 60
SOURCES = ("good", "good+synthetic", "natural", "random-normal", "test")
METHODS = ("minmax", "percentile", "entropy", "mse")
GRIDS = ("full", "sources")
"""All questions of the study, or only the calibration sources and methods."""


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
    """The ways of a ``grid``, one of ``GRIDS``: complete where it is cheap, otherwise those that answer questions."""
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
    """A detector, the images, and results that many cells share."""

    def __init__(self, model: str, first: str | None, data: str, natural: str, seed: int) -> None:
        self.data, self.natural, self.seed = data, natural, seed
        self.detector, self.metadata = load_float_model(model)
        self.first = load_float_model(first)[0] if first else None
        self.plans: dict[tuple[bool, bool], QuantizationPlan] = {}
        self.samples = training_samples(data, self.metadata.classes)
        self.training, self.held_out = split_again(self.metadata, self.samples)
        self.test = [sample for sample in scoring_samples([data]) if sample.class_name in self.metadata.classes]
        self.images = {name: self._read(part) for name, part in (
            ("held_out", self.held_out), ("test", self.test),
            ("correction", balanced(self.training, CORRECTION_IMAGES, seed)))}
        self.masks = [self._mask(sample) for sample in self.test]
        self.ranges: dict[tuple[bool, str, str, bool], Ranges] = {}

    def measure(self, cell: Cell) -> dict[str, float]:
        """Mean and pooled image AUROC, pixel AUROC and AUPRO of the quantized detector in ONNX Runtime."""
        detector = self.first if cell.procedure == "first" else self.detector
        assert detector is not None
        target = "onnxruntime" if cell.quantizers == "after" else "openvino"  # with float biases
        metadata = self.metadata.replace(precision="fp32" if cell.procedure == "float" else "int8", target=target)
        raw_maps = deployed_maps(self._quantized(cell, detector), metadata, len(self.held_out) + len(self.test))
        return self._evaluate(detector, metadata, raw_maps)

    def _quantized(self, cell: Cell, detector: Detector) -> nn.Module:
        if cell.procedure == "float":
            return detector
        plan = self._plan(cell, detector)
        float_layers = plan.layers_outside(detector.trained_network) if cell.scope == "student" else []
        ranges = self._calibrate(cell, detector)
        target = TARGETS["onnxruntime"]
        if isinstance(plan, unfused.UnfusedPlan):
            return unfused.quantize(plan, ranges, replace(target, integer_bias=False), float_layers,
                                    per_tensor="per tensor" in cell.quantizers)
        correction = None if cell.procedure == "ptq" else BiasCorrection(plan, self.images["correction"])
        if cell.procedure != "qat":
            return quantize(plan, ranges, target, float_layers, correction)
        good = self._read(balanced(self.held_out, 16, self.seed))
        anomalous = synthetic_anomalies(good.numpy(), good.numpy(), np.random.default_rng(self.seed))
        with TemporaryDirectory() as folder:
            tuned, learned = fine_tune(plan, ranges, target, float_layers, self.training, self.metadata.reading,
                                       [good, torch.from_numpy(anomalous)], correction, QAT_STEPS, self.seed,
                                       Path(folder, "checkpoint"), {}, False)
        return quantize(tuned, learned, target, float_layers)

    def _plan(self, cell: Cell, detector: Detector) -> QuantizationPlan:
        key = detector is self.first, cell.quantizers == "after"
        if key not in self.plans:
            self.plans[key] = QuantizationPlan(detector) if key[1] else unfused.UnfusedPlan(detector)
        return self.plans[key]

    def _calibrate(self, cell: Cell, detector: Detector) -> Ranges:
        key = detector is self.first, cell.source, cell.method, cell.quantizers == "after"
        if key not in self.ranges:
            sources = {"good+synthetic": ["good", "synthetic-anomalies"], "natural": [f"images:{self.natural}"],
                       "test": [f"images:{self.data}"]}.get(cell.source, [cell.source])
            batches, _ = calibration_batches(sources, self.samples, CALIBRATION_IMAGES, self.seed, detector,
                                             self.metadata.reading)
            self.ranges[key] = calibrate(self._plan(cell, detector), batches, cell.method)
        return self.ranges[key]

    @torch.inference_mode()
    def _evaluate(self, detector: Detector, metadata: Metadata, raw_maps: RawMaps) -> dict[str, float]:
        detector = copy.deepcopy(detector)  # each cell has statistics of its own
        fit_statistics(detector, raw_maps, metadata.classes, self._batches("held_out", self.held_out))
        maps = [detector.normalize_maps(*raw_maps(images)) for _, images in self._batches("test", self.test)]
        scores = torch.cat([detector.image_score(batch) for batch in maps]).tolist()
        evaluation = Evaluation()
        for sample, mask, score, anomaly_map in zip(self.test, self.masks, scores, torch.cat(maps).numpy()):
            name = str(sample.class_name)
            evaluation.add(name, sample.label != "good", score, score, score > 0)
            if mask is not None:
                evaluation.add_pixels(name, count_pixels(upsample(anomaly_map, metadata.image_size), mask))
        figures = evaluation.figures()
        return {"image_auroc": figures["image_auroc"]["mean"], "pooled": figures["image_auroc"]["pooled"],
                **{name: figures.get(name, {}).get("mean", float("nan")) for name in ("pixel_auroc", "aupro")}}

    def _batches(self, name: str, samples: list[Sample]) -> Iterator[tuple[list[Sample], Tensor]]:
        for start in range(0, len(samples), 32):
            yield samples[start:start + 32], self.images[name][start:start + 32]

    def _read(self, samples: list[Sample]) -> Tensor:
        return read_images(samples, self.metadata.reading, available_cores())

    def _mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """At the size of the input; None if a defect has no mask."""
        size = self.metadata.image_size
        if sample.label == "good":
            return np.zeros(size, bool)
        return read_masks(sample.masks, size) if sample.masks else None


def natural_images(folder: Path, count: int, size: int) -> None:
    """Crops of the two photographs in scikit-learn, a temple and a flower, as images of another domain."""
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
    parser.add_argument("--grid", choices=GRIDS, default="full", help="ways to try")
    parser.add_argument("--name", required=True, help="name of the detector in the results")
    parser.add_argument("--seed", type=int, default=0, help="seed for the calibration images")
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
