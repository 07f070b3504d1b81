"""Quantization-aware training: the student learns to give the float detector's anomaly maps in spite of the rounding.

The loss is taken from the maps, of good images and of ones with synthetic anomalies. A student that only saw good ones
would learn to follow the teacher everywhere, on defects, too. The teacher stays: what it says decides what is
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
from torch.func import functional_call
from torch.nn import functional as F

from uadtool.data.dataset import Sample
from uadtool.host import available_cores
from uadtool.lab.detectors.contract import Detector, OutputTensors
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.modules import (
    WEIGHT_LIMIT,
    ActivationQuantizer,
    Layer,
    QuantizedLayer,
    quantized_layer,
    weight_scale,
)
from uadtool.lab.quantization.ptq import quantize, quantized_graph
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.sensitivity import anomaly_maps, map_distance
from uadtool.lab.quantization.targets import Target
from uadtool.lab.training.data import read_images
from uadtool.lab.training.loop import batch_indices, optimize
from uadtool.lab.training.synthetic import synthetic_anomalies

LEARNING_RATE, SCALE_LEARNING_RATE = 3e-4, 3e-3
"""Of weights and biases, and of the logarithms of scales. At one rate for both the scales hardly move in 100 steps."""


def fine_tune(detector: Detector, ranges: Ranges, target: Target, float_layers: Sequence[str],
              samples: Sequence[Sample], image_size: tuple[int, int], held_out: Sequence[Tensor],
              correction: Optional[Tensor], steps: int, seed: int, checkpoint: Path, config: dict[str, Any],
              resume: bool) -> tuple[Detector, Ranges]:
    """Train the student with its quantizers, from where post-training quantization ends.

    Adam moves the student's weights and biases, and the scales of what depends on them (zero points stay). The state
    with the lowest ``map_distance`` on held-out images is kept, that at the start included.

    Args:
        float_layers: names of layers that stay float.
        samples: good images to train on; half of each batch of 16 gets synthetic anomalies.
        held_out: batches of uint8 [N, H, W, 3], good ones and ones with synthetic anomalies.
        correction: images to correct the biases with at the start, as for ``quantize``.
        steps: number of batches.
        checkpoint, config, resume: as in ``training.loop.Run``; the caller removes the checkpoint.

    Returns:
        Another float detector, and its ranges. It holds the biases that suit the quantized one: ``quantize`` without
        images gives the model that the training ended with.

    Raises:
        UadtoolError: as ``quantize``, or the checkpoint is of another run.
        ImageError: a training image cannot be read.
        KeyboardInterrupt: SIGINT came; the checkpoint is written.
    """
    tuned = copy.deepcopy(detector).requires_grad_(False)
    start = quantize(detector, ranges, target, float_layers, correction)
    for name, module in start.named_modules():
        if isinstance(module, QuantizedLayer):
            tuned.get_submodule(name).bias = nn.Parameter(module.bias.clone(), requires_grad=False)
    tuned.get_submodule(detector.trained).requires_grad_(True)
    model = trainable(tuned, ranges, target, float_layers)
    student, points = tuned.get_submodule(detector.trained), model.get_submodule("points")
    optimizer = torch.optim.Adam([{"params": list(student.parameters()), "lr": LEARNING_RATE},
                                  {"params": list(points.parameters()), "lr": SCALE_LEARNING_RATE}])
    expected = anomaly_maps(detector, held_out)

    def training_loss(step: int) -> Tensor:
        chosen = [samples[index] for index in batch_indices(len(samples), step, seed)]
        images = with_anomalies(read_images(chosen, image_size, available_cores()), np.random.default_rng((seed, step)))
        with torch.no_grad():
            wanted = OutputTensors(*detector(images)).anomaly_map
        return F.smooth_l1_loss(OutputTensors(*model(images)).anomaly_map, wanted)

    optimize(nn.ModuleDict({"student": student, "points": points}), optimizer, training_loss,
             lambda: map_distance(expected, anomaly_maps(model, held_out)), steps, checkpoint, config, resume,
             keep_start=True)
    learned = {name: point.range() for name, point in points.named_children() if isinstance(point, LearnedQuantizer)}
    return tuned, {**ranges, **learned}


def trainable(detector: Detector, ranges: Ranges, target: Target, float_layers: Sequence[str]) -> fx.GraphModule:
    """The quantized graph whose student has float weights, shared with the detector, and learned scales."""
    graph = QuantizableGraph(detector)
    trained = f"{detector.trained}."
    moving = _points_after(graph, trained)

    limits = graph.limits()

    def quantizer(name: str) -> ActivationQuantizer:
        if name not in moving:
            return ActivationQuantizer.from_range(*ranges[name], target.signed)
        learned = LearnedQuantizer.from_range(*ranges[name], target.signed)
        assert isinstance(learned, LearnedQuantizer)
        if name in limits:
            learned.most = max(0.0, math.log(limits[name] / learned.range()[1]))
        return learned

    def quantized(name: str, layer: Layer) -> nn.Module:
        return RoundingLayer(layer) if name.startswith(trained) else quantized_layer(layer)

    target = replace(target, half=False)  # too coarse for gradients
    return quantized_graph(graph, quantizer, target, float_layers, quantized)


def with_anomalies(images: Tensor, generator: np.random.Generator) -> Tensor:
    """The images [N, H, W, 3], uint8, every other one with a synthetic anomaly."""
    good = images.numpy()
    mixed = good.copy()
    mixed[1::2] = synthetic_anomalies(good[1::2], good, generator)
    return torch.from_numpy(mixed)


def _points_after(graph: QuantizableGraph, trained: str) -> set[str]:
    """The names of the points whose values depend on weights of the trained network."""
    layers, after = {name for name in graph.layers if name.startswith(trained)}, set[fx.Node]()
    for node in graph.module.graph.nodes:
        if node.target in layers or after.intersection(node.all_input_nodes):
            after.add(node)
    return {name for node, name in graph.points.items() if node in after}


class RoundingLayer(nn.Module):
    """Computes with rounded weights, as ``QuantizedLayer`` does, and passes gradients to the float ones."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        weight = self.layer.weight
        scale = weight_scale(weight.detach())
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0,
                                                         -WEIGHT_LIMIT, WEIGHT_LIMIT)
        result: Tensor = functional_call(self.layer, {"weight": rounded}, (values,))
        return result


class LearnedQuantizer(ActivationQuantizer):
    """Learns its scale, as a factor ``exp(change)`` on the one at the start.

    The gradient is that of LSQ (Esser et al., ICLR 2020). With Adam a step in the logarithm is the same relative one
    for every scale (Jain et al., MLSys 2020, arXiv 1903.08066), so LSQ's own balancing of gradients is not needed.

    ``change`` stays below ``most``: ONNX Runtime fuses no ReLU6 whose limit is not the last code, or beyond it.
    """

    def __init__(self, signed: bool = False) -> None:
        super().__init__(signed)
        self.change = nn.Parameter(torch.zeros(()))
        self.most = math.inf

    def range(self) -> tuple[float, float]:
        """From which ``ActivationQuantizer.from_range`` makes a quantizer with just this scale and zero point."""
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

    Values up to half a code outside of the range, which round to its ends, still pass their gradient.
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
