"""Quantization-aware training: the student learns to give the float detector's anomaly maps despite the rounding.

The loss compares the maps of good images and of images with synthetic anomalies. A student that only saw good images
would learn to follow the teacher everywhere, also on defects. The teacher is not trained: its features decide what is
anomalous. Batch norm is folded before, so its statistics are frozen.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uadtool.data.samples import Sample
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import Detector, OutputTensors
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.modules import (
    ActivationQuantizer,
    Layer,
    Quantizable,
    QuantizedLayer,
    RoundingLayer,
    quantized_layer,
)
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize, quantized_graph
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.sensitivity import anomaly_maps, in_both, map_distance
from uadtool.lab.quantization.targets import Target
from uadtool.lab.training.data import read_images
from uadtool.lab.training.loop import batch_indices, optimize
from uadtool.lab.training.synthetic import synthetic_anomalies
from uadtool.metadata import Reading

LEARNING_RATE, SCALE_LEARNING_RATE = 3e-4, 3e-3
"""For weights and biases, and for logarithms of scales. At one rate for both, scales hardly move in 100 steps."""


def fine_tune(plan: QuantizationPlan, ranges: Ranges, target: Target, float_layers: Sequence[str],
              samples: Sequence[Sample], reading: Reading, held_out: Sequence[Tensor],
              correction: Optional[BiasCorrection], steps: int, seed: int, checkpoint: Path, config: dict[str, Any],
              resume: bool) -> tuple[QuantizationPlan, Ranges]:
    """Train the student with its quantizers, starting from the result of post-training quantization.

    Adam trains the student's weights and biases, and the scales of what depends on them (zero points stay). The state
    with the lowest ``map_distance`` on held-out images is kept, which may be the first.

    Args:
        plan: of a float detector, which stays as it is.
        float_layers: names of layers that stay float.
        samples: good images to train on; half of each batch of 16 gets synthetic anomalies.
        held_out: batches of uint8 [N, H, W, 3], good images and images with synthetic anomalies.
        correction: corrects the biases at the start, as in ``quantize``.
        steps: number of batches.
        checkpoint, config, resume: as in ``training.loop.Run``; the caller removes the checkpoint.

    Returns:
        The plan of another float detector, and its ranges. It holds the biases for the quantized detector:
        ``quantize`` without a correction gives the model with which the training ended.

    Raises:
        UadtoolError: as ``quantize``, or the checkpoint belongs to another run.
        ImageError: a training image cannot be read.
        KeyboardInterrupt: a SIGINT arrived; the checkpoint is written.
    """
    assert isinstance(plan.detector, Detector)
    tuned = copy.deepcopy(plan.detector).requires_grad_(False)
    for name, module in quantize(plan, ranges, target, float_layers, correction).named_modules():
        if isinstance(module, QuantizedLayer):
            tuned.get_submodule(name).bias = nn.Parameter(module.bias.clone(), requires_grad=False)
    student = tuned.get_submodule(tuned.trained_network).requires_grad_(True)
    tuned_plan = QuantizationPlan(tuned)
    model = trainable(tuned_plan, ranges, target, float_layers, tuned.trained_network)
    points = model.get_submodule("points")
    optimizer = torch.optim.Adam([{"params": list(student.parameters()), "lr": LEARNING_RATE},
                                  {"params": list(points.parameters()), "lr": SCALE_LEARNING_RATE}])
    expected = anomaly_maps(plan.traced, held_out)

    def training_loss(step: int) -> Tensor:
        batch = [samples[index] for index in batch_indices(len(samples), step, seed)]
        images = with_anomalies(read_images(batch, reading, available_cores()), np.random.default_rng((seed, step)))
        with torch.no_grad():
            float_map = OutputTensors(*plan.traced(images)).anomaly_map
        return F.smooth_l1_loss(*in_both(OutputTensors(*model(images)).anomaly_map, float_map))

    optimize(nn.ModuleDict({"student": student, "points": points}), optimizer, training_loss,
             lambda: map_distance(expected, anomaly_maps(model, held_out)), steps, checkpoint, config, resume,
             keep_start=True)
    learned = {name: point.range() for name, point in points.named_children() if isinstance(point, LearnedQuantizer)}
    return tuned_plan, {**ranges, **learned}


def trainable(plan: QuantizationPlan, ranges: Ranges, target: Target, float_layers: Sequence[str],
              network: str) -> fx.GraphModule:
    """The quantized graph in which one network has float weights, shared with the detector, and learned scales."""
    learned_points, limits = _points_after(plan, network), plan.limits()

    def quantizer(name: str) -> ActivationQuantizer:
        if name not in learned_points:
            return ActivationQuantizer.from_range(*ranges[name], target.signed)
        learned = LearnedQuantizer.from_range(*ranges[name], target.signed)
        if name in limits:
            learned.most = max(0.0, math.log(limits[name] / learned.range()[1]))
        return learned

    def quantized(name: str, layer: Quantizable) -> nn.Module:
        if name.startswith(f"{network}.") and isinstance(layer, Layer):
            return RoundingLayer(layer)
        return quantized_layer(layer, target)

    target = replace(target, half=False)  # too coarse for gradients
    return quantized_graph(plan, quantizer, target, float_layers, quantized)


def with_anomalies(images: Tensor, generator: np.random.Generator) -> Tensor:
    """The images, uint8 [N, H, W, 3], every second with a synthetic anomaly."""
    good = images.numpy()
    mixed = good.copy()
    mixed[1::2] = synthetic_anomalies(good[1::2], good, generator)
    return torch.from_numpy(mixed)


def _points_after(plan: QuantizationPlan, network: str) -> set[str]:
    """The names of the points whose values depend on weights of the network."""
    layers, after = set(plan.layers).difference(plan.layers_outside(network)), set[fx.Node]()
    for node in plan.traced.graph.nodes:
        if node.target in layers or after.intersection(node.all_input_nodes):
            after.add(node)
    return {name for node, name in plan.points.items() if node in after}


class LearnedQuantizer(ActivationQuantizer):
    """Learns its scale, as a factor ``exp(change)`` on the first scale.

    The gradient follows LSQ (Esser et al., ICLR 2020). With Adam a step in the logarithm is the same relative step for
    every scale (Jain et al., MLSys 2020, arXiv 1903.08066), so LSQ's own balancing of gradients is not needed.

    ``change`` stays below ``most``: ONNX Runtime only fuses a ReLU6 whose limit is the last code or beyond it.
    """

    def __init__(self, signed: bool = False) -> None:
        super().__init__(signed)
        self.change = nn.Parameter(torch.zeros(()))
        self.most = math.inf

    def range(self) -> tuple[float, float]:
        """The range from which ``ActivationQuantizer.from_range`` makes exactly this scale and zero point."""
        codes, zero_point, scale = torch.iinfo(self.zero_point.dtype), self.zero_point.item(), self._scale().item()
        lowest = -codes.max if codes.min else 0  # s8 codes are symmetric in effect
        return (lowest - zero_point) * scale, (codes.max - zero_point) * scale

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = _LearnedRounding.apply(values, self._scale(), self.zero_point)
        return result

    def _scale(self) -> Tensor:
        with torch.no_grad():
            self.change.clamp_(max=self.most)
        return self.scale * self.change.exp()


class _LearnedRounding(torch.autograd.Function):
    """Straight-through estimators for the values and the scale (LSQ, equations 3 and 5).

    Values up to half a code outside the range, which round to its ends, still pass their gradient.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = torch.iinfo(zero_point.dtype)
        rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), codes.min, codes.max)
        context.save_for_backward(values, rounded, scale)
        context.bounds = [(code - zero_point.int()) * scale for code in (codes.min - 0.5, codes.max + 0.5)]
        return rounded

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, rounded, scale = context.saved_tensors
        low, high = context.bounds
        passed = gradient * ((values >= low) & (values <= high))
        return passed, ((gradient * rounded).sum() - (passed * values).sum()) / scale, None
