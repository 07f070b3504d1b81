"""The steps from a float model and its ranges to a quantized one, in their order."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from uadtool import __version__
from uadtool.data.dataset import Sample, training_samples
from uadtool.data.splits import balanced
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import STATISTICS, Detector
from uadtool.lab.detectors.statistics import refit_statistics
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.ptq import half, layers_outside, matching_layers, quantize
from uadtool.lab.quantization.qat import fine_tune
from uadtool.lab.quantization.ranges import RangesFile, ranges_digest
from uadtool.lab.quantization.sensitivity import anomaly_maps, layer_sensitivity, map_distance
from uadtool.lab.quantization.targets import TARGETS, Target
from uadtool.lab.training.data import read_images, split_again
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Metadata, Quantization
from uadtool.progress import Progress

log = logging.getLogger("uadtool")

SENSITIVITY_IMAGES = 16
"""Held-out good ones; as many with synthetic anomalies are added."""
SENSITIVITY_CORRECTION = 8
"""Images that correct the bias of each layer in turn: fewer than for the result, for there are many layers."""


@dataclass(frozen=True)
class Recipe:
    """What to do; the options of ``uadtool quantize``.

    ``keep_float`` are patterns of layer names, ``keep_sensitive`` is how many of the most sensitive layers stay float,
    ``qat_steps`` of 0 is post-training quantization.
    """

    precision: str = "int8"
    target: str = "onnxruntime"
    scope: str = "all"
    keep_float: Sequence[str] = field(default_factory=list)
    keep_sensitive: int = 0
    bias_correction: bool = True
    sensitivity: bool = False
    qat_steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Quantized:
    """The quantized graph, its metadata, and what there is to tell."""

    model: nn.Module
    metadata: Metadata
    report: dict[str, Any]


class _Images:
    """Good images of the data set that a model was trained on."""

    def __init__(self, data: str, metadata: Metadata, seed: int) -> None:
        self.samples = training_samples(data, metadata.classes)
        self.training, held_out = split_again(metadata, self.samples)
        self.size, self.seed = metadata.image_size, seed
        good = self._read(held_out, SENSITIVITY_IMAGES)
        anomalous = synthetic_anomalies(good.numpy(), good.numpy(), np.random.default_rng(seed))
        self.sensitivity = [good, torch.from_numpy(anomalous)]

    def correction(self) -> Tensor:
        """Those to correct biases with."""
        return self._read(self.training, CORRECTION_IMAGES)

    def _read(self, samples: Sequence[Sample], count: int) -> Tensor:
        return read_images(balanced(list(samples), count, self.seed), self.size, available_cores())


def apply_recipe(detector: Detector, metadata: Metadata, digest: str, ranges: Optional[RangesFile], data: Optional[str],
                 recipe: Recipe, checkpoint: Path, resume: bool = False) -> Quantized:
    """Quantize a float detector as the recipe says.

    Args:
        digest: of the detector's file.
        ranges: recorded with it; None for fp16.
        data: the data set that it was trained on, wherever it lies now. Needed for all that looks at images; without,
            biases, score statistics and threshold stay as they are.
        checkpoint: file for the state of quantization-aware training; the caller removes it once it has saved the
            result.

    Raises:
        UadtoolError: the ranges are not of this detector, a pattern matches no layer, or as ``training_samples``.
    """
    target = TARGETS[recipe.target]
    step: dict[str, Any] = {"command": "quantize", "tool_version": __version__, "model_digest": digest,
                            **{k: v for k, v in asdict(recipe).items() if k not in ("precision", "target")}}
    report: dict[str, Any] = {}
    if (recipe.qat_steps or recipe.scope == "student") and not any(
            name == detector.trained for name, _ in detector.named_modules()):
        raise UadtoolError(f"the method {metadata.method} has no network that is trained, so there is nothing for QAT "
                           "or the scope student")
    images = _Images(data, metadata, recipe.seed) if data else None
    if ranges is None:
        model: nn.Module = half(detector)
        metadata = metadata.replace(precision="fp16", target=recipe.target)
    else:
        smooth = QuantizableGraph(detector).smooth_activations() if target.quantized_outputs else set()
        if smooth:
            log.warning("ONNX Runtime computes %s in float between int8 convolutions, slower than all in fp32; take "
                        "--target openvino, or a teacher with ReLU or ReLU6", " and ".join(sorted(smooth)))
        correction = images.correction() if images and recipe.bias_correction else None
        kept, sensitivity = _float_layers(detector, ranges, target, recipe, images, correction)
        if sensitivity:
            report["sensitivity"] = [{"layer": name, "map_distance": distance} for name, distance in sensitivity]
        if recipe.qat_steps:
            assert images is not None
            tuned, found = fine_tune(detector, ranges.ranges, target, kept, images.training, metadata.image_size,
                                     images.sensitivity, correction, recipe.qat_steps, recipe.seed, checkpoint,
                                     {**step, "target": recipe.target, "ranges": ranges_digest(ranges.ranges),
                                      "images": list_digest(sample.path for sample in images.samples)}, resume)
            model = quantize(tuned, found, target, kept)
        else:
            model = quantize(detector, ranges.ranges, target, kept, correction)
        _warn_of_another_teacher(metadata, recipe.target, kept, correction is not None)
        method = "qat" if recipe.qat_steps else "ptq"
        step["calibration"] = {"method": ranges.method, "source": ranges.source, "ranges": ranges_digest(ranges.ranges)}
        metadata = metadata.replace(
            precision="mixed" if kept else "int8", target=recipe.target,
            quantization=Quantization(method, ranges.method, str(ranges.source.get("kind", "?")), recipe.scope, kept))
        report |= {"points": len(ranges.ranges), "method": method, "float_layers": kept}
    metadata = metadata.replace(provenance=[*metadata.provenance, step])
    if images:
        report["map_distance"] = map_distance(anomaly_maps(detector, images.sensitivity),
                                              anomaly_maps(model, images.sensitivity))
        refitted = copy.deepcopy(detector)  # the model shares its statistics with the float one, which keeps its own
        metadata = refit_statistics(refitted, deployed_maps(model, metadata), metadata, images.samples)
        for name in STATISTICS:
            setattr(model, name, refitted.get_buffer(name))
    return Quantized(model, metadata, report)


def _warn_of_another_teacher(metadata: Metadata, target: str, kept: Sequence[str], corrected: bool) -> None:
    """Tell when a student that was trained with ``--teacher-int8`` learned another rounding than its teacher gets."""
    learned = metadata.provenance[0].get("teacher_int8") if metadata.provenance else None
    if learned is None:
        return
    others = [name for name in kept if name.startswith("teacher.")]
    if learned != target:
        log.warning("the student learned its teacher in int8 for %s, and here it is for %s", learned, target)
    elif others or not corrected:
        log.warning("the student learned its teacher in int8 with every layer and with biases corrected, and here %s",
                    f"{others[0]} stays float" if others else "they are not corrected")


def _float_layers(detector: Detector, ranges: RangesFile, target: Target, recipe: Recipe, images: Optional[_Images],
                  correction: Optional[Tensor]) -> tuple[list[str], list[tuple[str, float]]]:
    """The layers that stay float, in the order of the network, and the sensitivities of the others, worst first."""
    layers = QuantizableGraph(detector).layers
    kept = {*layers_outside(detector, recipe.scope), *matching_layers(detector, recipe.keep_float)}
    if len(kept) + recipe.keep_sensitive >= len(layers):
        raise UadtoolError("every layer would stay float; keep fewer, or take the float model as it is")
    sensitivity: list[tuple[str, float]] = []
    if recipe.sensitivity or recipe.keep_sensitive:
        assert images is not None
        candidates = [layer for layer in layers if layer not in kept]
        few = None if correction is None else correction[:SENSITIVITY_CORRECTION]
        with Progress("sensitivity", len(candidates)) as progress:
            for pair in layer_sensitivity(detector, ranges.ranges, target, images.sensitivity, candidates, few):
                sensitivity.append(pair)
                progress.update(note=f"{pair[0]} {pair[1]:.3f}")
        sensitivity.sort(key=lambda pair: -pair[1])
        kept |= {name for name, _ in sensitivity[:recipe.keep_sensitive]}
    return [layer for layer in layers if layer in kept], sensitivity
