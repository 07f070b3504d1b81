"""The experiment's switch: quantizers where a graph that was not fused has them, before the activations.

PyTorch's eager quantization does so when nobody calls ``fuse_modules``: each convolution and each addition ends in a
quantizer of its own, and the ReLU works on what is left. uadtool knows no other place than after the activations.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn

from uadtool.lab.detectors.contract import Detector
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.modules import WEIGHT_LIMIT, ActivationQuantizer, QuantizedConv2d
from uadtool.lab.quantization.observers import Observer, make_observer
from uadtool.lab.quantization.ptq import quantized_graph
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target


class UnfusedGraph(QuantizableGraph):
    """Points directly after convolutions and additions; activations and pools hand on what they are given."""

    def _find_points(self) -> dict[fx.Node, str]:
        points: dict[fx.Node, str] = {}
        for node in self.module.graph.nodes:
            sources = [self._before_activation(source) for source in node.all_input_nodes]
            if self._is(node, nn.Conv2d):
                if sources[0] not in points:
                    points[node.all_input_nodes[0]] = node.all_input_nodes[0].name  # the image
                points[node] = node.name
            elif len(sources) == 2 and self._is_addition(node) and all(source in points for source in sources):
                points[node] = node.name
        return points

    def _integer_operations(self, float_layers: set[str]) -> set[fx.Node]:
        integer = set[fx.Node]()
        for node in self.points:
            if self._is(node, nn.Conv2d):
                chosen = node.target not in float_layers
            else:
                chosen = self._is_addition(node) and all(
                    self._before_activation(source) in integer for source in node.all_input_nodes)
            if chosen:
                integer.add(node)
        return integer

    def _is_addition(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.name.startswith("add")

    def _before_activation(self, node: fx.Node) -> fx.Node:
        while self._is(node, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)):
            node = node.all_input_nodes[0]
        return node


class PerTensorConv2d(QuantizedConv2d):
    """One scale for all weights of a layer, as PyTorch's qnnpack configuration has it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        weight = conv.weight.detach()
        scale = weight.abs().max() / WEIGHT_LIMIT
        self.weight_scale.fill_(scale)
        self.weight.copy_(torch.round(weight / scale).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT))


@torch.inference_mode()
def calibrate(detector: Detector, batches: Iterable[Tensor], method: str) -> Ranges:
    """``uadtool.lab.quantization.calibration.calibrate`` for the unfused graph."""
    observers: dict[str, Observer] = {}

    def observer(name: str) -> Observer:
        observers[name] = make_observer(method, 99.99)
        return observers[name]

    model = UnfusedGraph(detector).observed(observer).eval()
    for batch in batches:
        model(batch)
    return {name: observer.range() for name, observer in observers.items()}


def quantize(detector: Detector, ranges: Ranges, target: Target, float_layers: Collection[str],
             per_tensor: bool) -> fx.GraphModule:
    """``uadtool.lab.quantization.ptq.quantize`` for the unfused graph; biases stay float."""
    return quantized_graph(
        UnfusedGraph(detector), lambda name: ActivationQuantizer.from_range(*ranges[name], target.signed), target,
        float_layers, lambda _, conv: PerTensorConv2d(conv) if per_tensor else QuantizedConv2d(conv))
