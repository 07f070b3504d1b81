"""Where a detector is quantized: at the tensors that integer kernels read or write.

Layers are convolutions and linear ones. What a linear layer writes stays float: normalisation, attention and the sum
over a transformer's blocks compute in float, so only what it reads has a point.

One graph serves observing, post-training quantization and quantization-aware training: they differ only in the module
that stands at each point. A point lies after the activation that follows a convolution or an addition, never between
the two: a quantizer before a ReLU6 spends its codes on values that the ReLU6 cuts off, which costs up to 0.15 AUROC.
"""

import copy
import operator
from collections.abc import Callable, Collection, Iterator
from types import UnionType
from typing import Optional

import torch
from torch import fx, nn
from torch.nn import functional as F

from uadtool.lab.detectors.backbones import Tracer
from uadtool.lab.quantization.modules import Layer
from uadtool.lab.quantization.targets import Target

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU)
_ACTIVATION_FUNCTIONS = {torch.relu, F.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu}
_ADDITIONS = {operator.add, torch.add}


class QuantizableGraph:
    """A traced detector and its points; batch norm must be folded. Layers are shared with the detector.

    ``points`` names each node whose output may be quantized, in execution order. A name stands for the same tensor in
    every run with the same detector configuration. ``layers`` are the names of the convolutions and linear layers.
    What follows the networks, the score head, has none, so it has no points and stays float.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.module = fx.GraphModule(detector, Tracer().trace(detector), class_name=type(detector).__name__)
        self._modules = dict(self.module.named_modules())
        self.layers = [str(node.target) for node in self.module.graph.nodes if self._is(node, Layer)]
        self.points = self._find_points()

    def smooth_activations(self) -> set[str]:
        """Those after convolutions that are more than a limit, as ReLU and ReLU6 are: SiLU, say."""
        behind = {self._activated(node) for node in self.module.graph.nodes if self._is(node, nn.Conv2d)}
        return {type(self._modules[str(node.target)]).__name__ for node in behind
                if self._is(node, _ACTIVATIONS) and not self._is(node, (nn.ReLU, nn.ReLU6))}

    def limits(self) -> dict[str, float]:
        """The points behind a ReLU6, with its limit."""
        return {name: 6.0 for node, name in self.points.items() if self._is(node, nn.ReLU6) or node.target is F.relu6}

    def observed(self, make: Callable[[str], nn.Module]) -> fx.GraphModule:
        """The graph with ``make(name)``, as ``points.NAME``, at every point for all that read there."""
        return self._insert(make, [(node, reader) for node in self.points for reader in node.users])

    def quantized(self, make: Callable[[str], nn.Module], target: Target,
                  float_layers: Collection[str] = ()) -> fx.GraphModule:
        """The graph with ``make(name)`` where integer kernels of ``target`` read or write.

        Args:
            float_layers: names of layers that stay float.
        """
        integer = self._integer_operations(set(float_layers))
        edges, rest = list(self._quantized_edges(target, integer)), self._operations() - integer
        model = self._insert(make, edges)
        if target.half:
            self._compute_in_half(rest)
        return model

    def half(self) -> fx.GraphModule:
        """The graph with layers, pools, additions and activations in fp16; attention, norms, score head in fp32."""
        self._compute_in_half(self._operations())
        return self.module

    def _insert(self, make: Callable[[str], nn.Module], edges: list[tuple[fx.Node, fx.Node]]) -> fx.GraphModule:
        names = dict.fromkeys(self.points[node] for node, _ in edges)
        self.module.points = nn.ModuleDict({name: make(name) for name in names})
        for node in dict(edges):
            with self.module.graph.inserting_after(node):
                quantized = self.module.graph.call_module(f"points.{self.points[node]}", (node,))
            for source, reader in edges:
                if source is node:
                    reader.replace_input_with(node, quantized)
        self.module.recompile()
        return self.module

    def _operations(self) -> set[fx.Node]:
        """What the networks consist of: layers, their additions and pools, and the activations after them."""
        found = {node for node in self.module.graph.nodes if self._is(node, Layer)
                 or (node.target in _ADDITIONS and self._activated(node) in self.points)
                 or (self._chooses(node) and node in self.points)}
        return found | {self._activated(node) for node in found}

    def _integer_operations(self, float_layers: set[str]) -> set[fx.Node]:
        """The operations that integer kernels do when these layers stay float."""
        operations, integer = self._operations(), set[fx.Node]()
        for node in self.module.graph.nodes:
            if self._is(node, Layer):
                chosen = node.target not in float_layers
            else:
                chosen = node in operations and all(source in integer for source in node.all_input_nodes)
            if chosen:
                integer.add(node)
        return integer

    def _quantized_edges(self, target: Target, integer: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Which reader of which point sees quantized values."""
        for node in self.points:
            linear = any(self._is(source, nn.Linear) for source in (node, *node.all_input_nodes))
            for reader in node.users:
                if target.quantized_outputs:
                    wanted = reader in integer or (node in integer and not linear)
                elif reader.target in _ADDITIONS:
                    wanted = reader in integer and self._fused_branch(reader) not in (None, node)
                else:
                    wanted = reader in integer and self._is(reader, Layer)
                if wanted:
                    yield node, reader

    def _compute_in_half(self, operations: set[fx.Node]) -> None:
        """Give these operations fp16 weights and inputs, and all others that read their results fp32."""
        graph = self.module.graph
        for node in [node for node in operations if self._is(node, Layer)]:
            self.module.set_submodule(str(node.target), copy.deepcopy(self._modules[str(node.target)]).half())
        for node in list(graph.nodes):
            readers = [reader for reader in node.users if (reader in operations) != (node in operations)]
            if readers:
                with graph.inserting_after(node):
                    cast = graph.call_method("float" if node in operations else "half", (node,))
                for reader in readers:
                    reader.replace_input_with(node, cast)
        self.module.recompile()

    def _fused_branch(self, addition: fx.Node) -> Optional[fx.Node]:
        """The input of an addition that a convolution adds to while it computes: that of the last one before it.

        None where activations stand between: such an addition computes in float.
        """
        branches = [node for node in addition.all_input_nodes if self._is(node, nn.Conv2d) and len(node.users) == 1]
        order = list(self.module.graph.nodes)
        return max(branches, key=order.index, default=None)

    def _find_points(self) -> dict[fx.Node, str]:
        points: dict[fx.Node, str] = {}
        for node in self.module.graph.nodes:
            inputs = node.all_input_nodes
            result = self._activated(node)
            if self._is(node, Layer):
                points.setdefault(inputs[0], inputs[0].name)
            addition = node.target in _ADDITIONS and len(inputs) == 2 and all(n in points for n in inputs)
            if addition or self._is(node, nn.Conv2d):
                points[result] = result.name
            elif self._chooses(node) and inputs[0] in points:
                points[node] = points[inputs[0]]
        return points

    def _chooses(self, node: fx.Node) -> bool:
        """Are its results values of its input, which need no range of their own?"""
        if node.target is F.interpolate:
            return bool(node.kwargs.get("mode", "nearest") == "nearest")
        return self._is(node, nn.MaxPool2d)

    def _is(self, node: fx.Node, kind: type[nn.Module] | UnionType | tuple[type[nn.Module], ...]) -> bool:
        return node.op == "call_module" and isinstance(self._modules.get(str(node.target)), kind)

    def _activated(self, node: fx.Node) -> fx.Node:
        """The activation that is the node's only reader, or else the node itself."""
        readers = list(node.users)
        if len(readers) == 1 and (self._is(readers[0], _ACTIVATIONS) or readers[0].target in _ACTIVATION_FUNCTIONS):
            return readers[0]
        return node
