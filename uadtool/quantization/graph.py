"""Where a detector is quantized: every convolution, and every tensor that integer kernels read or write.

One graph serves observing, post-training quantization and whatever comes later: they differ only in the module that
stands at each point. A point lies after the activation that follows a convolution or an addition, never between the
two: a quantizer before a ReLU6 spends its codes on values that the ReLU6 cuts off, which costs more than 0.1 AUROC.
"""

import operator
from collections.abc import Callable
from typing import Optional

import torch
from torch import fx, nn
from torch.nn import functional as F

from uadtool.detectors.backbones import PaddedConv2d
from uadtool.detectors.base import Detector

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU)
_ACTIVATION_FUNCTIONS = {torch.relu, F.relu, F.relu6, F.leaky_relu, F.hardswish, F.silu, F.gelu}
_ADDITIONS = {operator.add, torch.add}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PaddedConv2d) or super().is_leaf_module(m, module_qualified_name)


def place_at_points(detector: Detector, make: Callable[[str], nn.Module]) -> fx.GraphModule:
    """Trace the detector and put ``make(name)`` at each point, as ``model.points[name]``; batch norm must be folded.

    Layers are shared with the detector. A name stands for the same tensor in every run with the same detector
    configuration. The score head has no convolution, so it has no points and stays float.
    """
    graph = _Tracer().trace(detector)
    model = fx.GraphModule(detector, graph, class_name=type(detector).__name__)
    points = _find_points(model)
    model.points = nn.ModuleDict({name: make(name) for name in dict.fromkeys(points.values())})
    for node, name in points.items():
        readers = list(node.users)
        with graph.inserting_after(node):
            quantized = graph.call_module(f"points.{name}", (node,))
        for reader in readers:
            reader.replace_input_with(node, quantized)
    model.recompile()
    return model


def _find_points(model: fx.GraphModule) -> dict[fx.Node, str]:
    """Nodes whose output is quantized, in execution order, with the name of each one's point."""
    modules = dict(model.named_modules())

    def module(node: fx.Node) -> Optional[nn.Module]:
        return modules.get(str(node.target)) if node.op == "call_module" else None

    def activated(node: fx.Node) -> fx.Node:
        """The activation that is the node's only reader, or else the node itself."""
        readers = list(node.users)
        if len(readers) == 1 and (isinstance(module(readers[0]), _ACTIVATIONS)
                                  or readers[0].target in _ACTIVATION_FUNCTIONS):
            return readers[0]
        return node

    points: dict[fx.Node, str] = {}
    for node in model.graph.nodes:
        inputs = node.all_input_nodes
        result = activated(node)
        if isinstance(module(node), nn.Conv2d):
            points.setdefault(inputs[0], inputs[0].name)
            points[result] = result.name
        elif node.target in _ADDITIONS and len(inputs) == 2 and all(n in points for n in inputs):
            points[result] = result.name
        elif isinstance(module(node), nn.MaxPool2d) and inputs[0] in points:
            points[node] = points[inputs[0]]  # the maximum of quantized values needs no range of its own
    return points
