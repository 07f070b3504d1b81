"""Quantization as a step: from a float model and its ranges to a quantized model."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from uadtool import __version__
from uadtool.data.dataset import training_samples
from uadtool.data.samples import Sample
from uadtool.data.splits import balanced
from uadtool.errors import UadtoolError
from uadtool.files import list_digest
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import STATISTICS, Detector
from uadtool.lab.detectors.statistics import refit_statistics
from uadtool.lab.onnx_export.deployed import deployed_maps
from uadtool.lab.quantization.bias_correction import CORRECTION_IMAGES, BiasCorrection
from uadtool.lab.quantization.graph import in_half_precision
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.qat import fine_tune
from uadtool.lab.quantization.ranges import RangesFile, ranges_digest
from uadtool.lab.quantization.sensitivity import anomaly_maps, layer_sensitivity, map_distance
from uadtool.lab.quantization.targets import TARGETS
from uadtool.lab.rows import Model, row_statistics
from uadtool.lab.sizes import fit_every_size
from uadtool.lab.training.data import read_images, split_again
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Metadata, Quantization
from uadtool.progress import Progress
from uadtool.terminal import log

SENSITIVITY_IMAGES = 16
"""Held-out good images; the same number with synthetic anomalies is added."""
SENSITIVITY_CORRECTION = 8
"""Images that correct the bias of each layer in turn: fewer than for the result, since there are many layers."""


@dataclass(frozen=True)
class Recipe:
    """The options of ``uadtool quantize``.

    ``keep_float`` are patterns of layer names, ``keep_sensitive`` is the number of most sensitive layers that stay
    float, ``qat_steps`` of 0 is post-training quantization.
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
    """The quantized graph, its metadata, and the report of the command."""

    model: nn.Module
    metadata: Metadata
    report: dict[str, Any]


class _Images:
    """Good images of the data set that a model was trained on."""

    def __init__(self, data: str, metadata: Metadata, seed: int) -> None:
        self.samples = training_samples(data, metadata.classes)
        self.training, held_out = split_again(metadata, self.samples)
        self.held_out_count, self.reading, self.seed = len(held_out), metadata.reading, seed
        good = self._read(held_out, SENSITIVITY_IMAGES)
        anomalous = synthetic_anomalies(good.numpy(), good.numpy(), np.random.default_rng(seed))
        self.held_out = [good, torch.from_numpy(anomalous)]

    def correction(self) -> Tensor:
        """The images to correct biases with."""
        return self._read(self.training, CORRECTION_IMAGES)

    def _read(self, samples: Sequence[Sample], count: int) -> Tensor:
        return read_images(balanced(list(samples), count, self.seed), self.reading, available_cores())


def apply_recipe(detector: Detector, metadata: Metadata, digest: str, ranges: Optional[RangesFile], data: Optional[str],
                 recipe: Recipe, checkpoint: Path, resume: bool = False) -> Quantized:
    """Quantize a float detector as the recipe says.

    Args:
        digest: of the detector's file.
        ranges: recorded with the detector; None for fp16.
        data: the data set that the detector was trained on, which may have moved. Bias correction, sensitivity and QAT
            require it; without it, biases, score statistics and threshold stay as they are.
        checkpoint: file for the state of quantization-aware training; the caller removes it once the result is saved.

    Raises:
        UadtoolError: the ranges belong to another detector, a pattern matches no layer, or as ``training_samples``.
    """
    networks = dict(detector.named_modules())
    if (recipe.qat_steps or recipe.scope == "student") and detector.trained_network not in networks:
        raise UadtoolError(f"the method {metadata.method} does not train a network, so --qat and --scope student "
                           "do not apply")
    plan = QuantizationPlan(detector)
    images = _Images(data, metadata, recipe.seed) if data else None
    step: dict[str, Any] = {"command": "quantize", "tool_version": __version__, "model_digest": digest,
                            **{k: v for k, v in asdict(recipe).items() if k not in ("precision", "target")}}
    if ranges:
        model, metadata, report = _to_int8(plan, metadata, ranges, images, recipe, step, checkpoint, resume)
        step["calibration"] = {"method": ranges.method, "source": ranges.source, "ranges": ranges_digest(ranges.ranges)}
    else:
        model, metadata, report = in_half_precision(plan), metadata.replace(precision="fp16", target=recipe.target), {}
    # Distances by a quantized teacher are not comparable with those of the float one, by which drift would be found.
    metadata = metadata.replace(provenance=[*metadata.provenance, step], good_distances={})
    if images:
        report["map_distance"] = map_distance(anomaly_maps(detector, images.held_out),
                                              anomaly_maps(model, images.held_out))
        metadata = _refit(Model(model, metadata), images)
    return Quantized(model, metadata, report)


def _refit(model: Model, images: _Images) -> Metadata:
    """Set the statistics of a quantized model at every size; the float detector that it shares them with keeps its."""
    for name in STATISTICS:
        setattr(model.module, name, model.module.get_buffer(name).clone())
    model.module.sizes = copy.deepcopy(model.module.sizes)

    def fit(one: Model) -> Metadata:
        raw_maps = deployed_maps(one.module, one.metadata, images.held_out_count)
        return refit_statistics(row_statistics(one), raw_maps, one.metadata, images.samples)

    return fit_every_size(model, fit).metadata


def _to_int8(plan: QuantizationPlan, metadata: Metadata, ranges: RangesFile, images: Optional[_Images], recipe: Recipe,
             step: dict[str, Any], checkpoint: Path, resume: bool) -> tuple[nn.Module, Metadata, dict[str, Any]]:
    """The int8 graph, its metadata and the report."""
    target = TARGETS[recipe.target]
    if target.quantized_outputs and (smooth := plan.smooth_activations()):
        log.warning("ONNX Runtime computes %s in float between int8 convolutions, slower than all in fp32; use "
                    "--target openvino, or a teacher with ReLU or ReLU6", " and ".join(sorted(smooth)))
    correction_images = images.correction() if images and recipe.bias_correction else None
    float_layers, report = _float_layers(plan, ranges, recipe, images, correction_images)
    correction = None if correction_images is None else BiasCorrection(plan, correction_images)
    if recipe.qat_steps:
        assert images is not None
        config = {**step, "target": recipe.target, "ranges": ranges_digest(ranges.ranges),
                  "images": list_digest(sample.path for sample in images.samples)}
        tuned, learned = fine_tune(plan, ranges.ranges, target, float_layers, images.training, metadata.reading,
                                   images.held_out, correction, recipe.qat_steps, recipe.seed, checkpoint, config,
                                   resume)
        model = quantize(tuned, learned, target, float_layers)
    else:
        model = quantize(plan, ranges.ranges, target, float_layers, correction)
    _warn_of_another_teacher(metadata, recipe.target, float_layers, correction is not None)
    method, source = "qat" if recipe.qat_steps else "ptq", str(ranges.source.get("kind", "?"))
    metadata = metadata.replace(precision="mixed" if float_layers else "int8", target=recipe.target,
                                quantization=Quantization(method, ranges.method, source, recipe.scope, float_layers))
    return model, metadata, {**report, "points": len(ranges.ranges), "method": method, "float_layers": float_layers}


def _float_layers(plan: QuantizationPlan, ranges: RangesFile, recipe: Recipe, images: Optional[_Images],
                  correction_images: Optional[Tensor]) -> tuple[list[str], dict[str, Any]]:
    """The layers that stay float, in execution order, and the report on the sensitivity of the others."""
    kept = set(plan.matching_layers(recipe.keep_float))
    if recipe.scope == "student":
        kept.update(plan.layers_outside(str(plan.detector.trained_network)))
    if len(kept) + recipe.keep_sensitive >= len(plan.layers):
        raise UadtoolError("every layer would stay float; keep fewer, or use the float model")
    report: dict[str, Any] = {}
    if recipe.sensitivity or recipe.keep_sensitive:
        assert images is not None
        few_images = None if correction_images is None else correction_images[:SENSITIVITY_CORRECTION]
        correction = None if few_images is None else BiasCorrection(plan, few_images)
        candidates, distances = [layer for layer in plan.layers if layer not in kept], dict[str, float]()
        with Progress("sensitivity", len(candidates)) as progress:
            for layer, distance in layer_sensitivity(plan, ranges.ranges, TARGETS[recipe.target], images.held_out,
                                                     candidates, correction):
                distances[layer] = distance
                progress.update(note=f"{layer} {distance:.3f}")
        worst_first = sorted(distances, key=lambda layer: -distances[layer])
        kept.update(worst_first[:recipe.keep_sensitive])
        report["sensitivity"] = [{"layer": layer, "map_distance": distances[layer]} for layer in worst_first]
    return [layer for layer in plan.layers if layer in kept], report


def _warn_of_another_teacher(metadata: Metadata, target: str, float_layers: Sequence[str], corrected: bool) -> None:
    """Warn when a student that was trained with ``--teacher-int8`` learned another rounding than its teacher gets."""
    learned_target = metadata.provenance[0].get("teacher_int8") if metadata.provenance else None
    if learned_target is None:
        return
    float_teacher = [name for name in float_layers if name.startswith("teacher.")]
    if learned_target != target:
        log.warning("the student learned its teacher in int8 for %s, but this is for %s", learned_target, target)
    elif float_teacher or not corrected:
        log.warning("the student learned its teacher in int8 with every layer and with biases corrected, but here %s",
                    f"{float_teacher[0]} stays float" if float_teacher else "they are not corrected")
