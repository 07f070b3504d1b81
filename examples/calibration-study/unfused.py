"""The experiment's switch: quantizers before the activations, as in a graph that was not fused.

PyTorch's eager quantization has them there if ``fuse_modules`` was not called: each convolution and each addition ends
in a quantizer of its own, and the ReLU reads rounded values. uadtool only places quantizers after the activations.
"""

from collections.abc import Collection

import torch
from torch import fx, nn

from uadtool.lab.quantization.modules import WEIGHT_LIMIT, ActivationQuantizer, QuantizedConv2d
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantized_graph
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target


class UnfusedPlan(QuantizationPlan):
    """Points directly after convolutions and additions; activations and pools pass quantized values on."""

    def integer_operations(self, float_layers: Collection[str]) -> set[fx.Node]:
        integer = set[fx.Node]()
        for node in self.points:
            if self._is(node, nn.Conv2d):
                quantized = node.target not in float_layers
            else:
                quantized = self._is_addition(node) and all(
                    self._before_activation(source) in integer for source in node.all_input_nodes)
            if quantized:
                integer.add(node)
        return integer

    def _find_points(self) -> dict[fx.Node, str]:
        points: dict[fx.Node, str] = {}
        for node in self.traced.graph.nodes:
            sources = [self._before_activation(source) for source in node.all_input_nodes]
            if self._is(node, nn.Conv2d):
                if sources[0] not in points:
                    points[node.all_input_nodes[0]] = node.all_input_nodes[0].name  # the image
                points[node] = node.name
            elif len(sources) == 2 and self._is_addition(node) and all(source in points for source in sources):
                points[node] = node.name
        return points

    def _is_addition(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.name.startswith("add")

    def _before_activation(self, node: fx.Node) -> fx.Node:
        while self._is(node, (nn.ReLU, nn.ReLU6, nn.MaxPool2d)):
            node = node.all_input_nodes[0]
        return node


class PerTensorConv2d(QuantizedConv2d):
    """One scale for all weights of a layer, as in PyTorch's qnnpack configuration."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        weight = conv.weight.detach()
        scale = weight.abs().max() / WEIGHT_LIMIT
        self.weight_scale.fill_(scale)
        self.weight.copy_(torch.round(weight / scale).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT))


def quantize(plan: UnfusedPlan, ranges: Ranges, target: Target, float_layers: Collection[str],
             per_tensor: bool) -> fx.GraphModule:
    """``uadtool.lab.quantization.ptq.quantize`` for the unfused plan; biases stay float."""
    return quantized_graph(
        plan, lambda name: ActivationQuantizer.from_range(*ranges[name], target.signed), target, float_layers,
        lambda _, conv: PerTensorConv2d(conv) if per_tensor else QuantizedConv2d(conv))
