"""Where a detector is quantized: at the tensors that integer kernels read or write.

Layers are convolutions, linear layers and memories. The output of a linear layer stays float, so only the input has a
point: normalisation, attention and the residual sums of a transformer compute in float. A memory has no points: it
quantizes what it looks up, and an average of integers before it would take ONNX Runtime ten times as long.

A point lies after the activation that follows a convolution or an addition, never between the two: a quantizer before a
ReLU6 spends its codes on values that the ReLU6 cuts off, which costs up to 0.15 AUROC.
"""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import UnionType
from typing import Optional

import torch
from torch import fx, nn
from torch.nn import functional as F

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import traced
from uadtool.lab.detectors.patch_memory import PatchMemory
from uadtool.lab.quantization.modules import Layer, Quantizable
from uadtool.lab.quantization.targets import Target

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU)
_ACTIVATION_FUNCTIONS = {torch.relu, F.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu}
_ADDITIONS = {operator.add, torch.add}


class QuantizationPlan:
    """Which tensors of a detector can be quantized; ``quantization.graph`` makes new graphs from it.

    A plan is read-only; batch norm must be folded. ``traced`` is the detector as a graph, which shares its layers and
    buffers. ``layers`` are the names of the convolutions, linear layers and memories, in execution order; ``memories``
    are the last kind. ``points`` are the nodes whose output may be quantized, in execution order, with the names of
    their points. A name stands for the same tensor in every run with the same detector configuration. The score head
    has no points and stays float.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.detector = detector
        self.traced = traced(detector)
        self._modules = dict(self.traced.named_modules())
        self.layers = tuple(str(node.target) for node in self.traced.graph.nodes if self._is(node, Quantizable))
        self.memories = tuple(str(node.target) for node in self.traced.graph.nodes if self._is(node, PatchMemory))
        self.points: Mapping[fx.Node, str] = self._find_points()

    def matching_layers(self, patterns: Sequence[str]) -> list[str]:
        """The names of the layers that a pattern (``student.*``, with shell wildcards) matches.

        Raises:
            UadtoolError: a pattern matches no layer.
        """
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in self.layers):
                raise UadtoolError(f"no layer is named {pattern!r}; the model has {self.layers[0]}, {self.layers[1]} "
                                   f"... {self.layers[-1]}")
        return [layer for layer in self.layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]

    def layers_outside(self, network: str) -> list[str]:
        """The names of the layers that do not belong to this network of the detector."""
        return [layer for layer in self.layers if not layer.startswith(f"{network}.")]

    def smooth_activations(self) -> set[str]:
        """Types of the activations after convolutions that do more than clip, such as SiLU."""
        activations = {self._activated(node) for node in self.traced.graph.nodes if self._is(node, nn.Conv2d)}
        return {type(self._modules[str(node.target)]).__name__ for node in activations
                if self._is(node, _ACTIVATIONS) and not self._is(node, (nn.ReLU, nn.ReLU6))}

    def limits(self) -> dict[str, float]:
        """The points after a ReLU6, with its limit."""
        return {name: 6.0 for node, name in self.points.items() if self._is(node, nn.ReLU6) or node.target is F.relu6}

    def quantized_edges(self, target: Target, float_layers: Collection[str]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Each (point, reader) where the reader sees quantized values."""
        integer = self.integer_operations(float_layers)
        for node in self.points:
            linear = any(self._is(source, nn.Linear) for source in (node, *node.all_input_nodes))
            for reader in node.users:
                if target.quantized_outputs:
                    quantized = reader in integer or (node in integer and not linear)
                elif reader.target in _ADDITIONS:
                    quantized = reader in integer and self._fused_branch(reader) not in (None, node)
                else:
                    quantized = reader in integer and self._is(reader, Layer)
                if quantized:
                    yield node, reader

    def integer_operations(self, float_layers: Collection[str]) -> set[fx.Node]:
        """The operations that integer kernels compute when these layers stay float."""
        operations, integer = self.operations(), set[fx.Node]()
        for node in self.traced.graph.nodes:
            if self._is(node, Quantizable):
                quantized = node.target not in float_layers
            else:
                quantized = node in operations and all(source in integer for source in node.all_input_nodes)
            if quantized:
                integer.add(node)
        return integer

    def operations(self) -> set[fx.Node]:
        """The operations of the networks: layers, their additions and pools, and the activations after them."""
        operations = {node for node in self.traced.graph.nodes if self._is(node, Quantizable)
                      or (node.target in _ADDITIONS and self._activated(node) in self.points)
                      or (self._pools(node) and node.all_input_nodes[0] in self.points)}
        return operations | {self._activated(node) for node in operations}

    def _find_points(self) -> dict[fx.Node, str]:
        points: dict[fx.Node, str] = {}
        for node in self.traced.graph.nodes:
            inputs = node.all_input_nodes
            result = self._activated(node)
            if self._is(node, Layer):
                points.setdefault(inputs[0], inputs[0].name)
            addition = node.target in _ADDITIONS and len(inputs) == 2 and all(n in points for n in inputs)
            if addition or self._is(node, nn.Conv2d):
                points[result] = result.name
            elif (self._pools(node) and inputs[0] in points
                  and not all(self._is(reader, PatchMemory) for reader in node.users)):
                points[node] = points[inputs[0]]
        return points

    def _fused_branch(self, addition: fx.Node) -> Optional[fx.Node]:
        """The input of an addition that is added while its convolution computes: the last convolution before it.

        None if activations stand between: such an addition computes in float.
        """
        branches = [node for node in addition.all_input_nodes if self._is(node, nn.Conv2d) and len(node.users) == 1]
        order = list(self.traced.graph.nodes)
        return max(branches, key=order.index, default=None)

    def _pools(self, node: fx.Node) -> bool:
        """Whether its results are values of its input, or between them, which need no range of their own."""
        if node.target is F.interpolate:
            return bool(node.kwargs.get("mode", "nearest") == "nearest")
        return node.target is F.avg_pool2d or self._is(node, nn.MaxPool2d)

    def _is(self, node: fx.Node, kind: type[nn.Module] | UnionType | tuple[type[nn.Module], ...]) -> bool:
        return node.op == "call_module" and isinstance(self._modules.get(str(node.target)), kind)

    def _activated(self, node: fx.Node) -> fx.Node:
        """The activation that is the node's only reader, otherwise the node itself."""
        readers = list(node.users)
        if len(readers) == 1 and (self._is(readers[0], _ACTIVATIONS) or readers[0].target in _ACTIVATION_FUNCTIONS):
            return readers[0]
        return node
