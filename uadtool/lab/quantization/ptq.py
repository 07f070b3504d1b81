"""Post-training quantization of a detector whose batch norm is folded."""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Optional

from torch import Tensor, fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.quantization.bias_correction import correct_biases
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.modules import ActivationQuantizer, Layer, QuantizedConv2d, quantized_layer
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import TARGETS, Target


def quantize(detector: nn.Module, ranges: Ranges, target: Target = TARGETS["onnxruntime"],
             float_layers: Collection[str] = (), images: Optional[Tensor] = None) -> fx.GraphModule:
    """Post-training quantization of the layers of all networks; the score head stays float.

    Args:
        float_layers: names of layers that stay float, too.
        images: good ones, uint8 [N, H, W, 3], to correct the biases with; about 32.

    Raises:
        UadtoolError: the ranges are not of this detector's points.
    """
    graph = QuantizableGraph(detector)
    names = set(graph.points.values())
    if names != ranges.keys():
        first = min(names ^ ranges.keys())
        raise UadtoolError(f"the ranges {'lack' if first in names else 'have'} {first!r}: they were made from another "
                           "model or by another version; run calibrate again")
    model = quantized_graph(graph, lambda name: ActivationQuantizer.from_range(*ranges[name], target.signed), target,
                            float_layers)
    if images is not None:
        correct_biases(detector, model, images)
    if target.integer_bias:
        modules = dict(model.named_modules())
        for node in model.graph.nodes:
            conv = modules.get(str(node.target))
            if isinstance(conv, QuantizedConv2d):
                conv.round_bias(modules[str(node.args[0].target)].scale)
    return model


def half(detector: Detector) -> fx.GraphModule:
    """The detector with its layers in fp16; attention, norms and the score head stay fp32."""
    return QuantizableGraph(detector).half().eval()


def empty_quantized(detector: Detector, precision: str, target: Target,
                    float_layers: Collection[str] = ()) -> fx.GraphModule:
    """The graph that ``half`` (precision fp16) or ``quantize`` makes, to load a state dict into."""
    if precision == "fp16":
        return half(detector)
    return quantized_graph(QuantizableGraph(detector), lambda name: ActivationQuantizer(target.signed), target,
                           float_layers)


def matching_layers(detector: Detector, patterns: Sequence[str]) -> list[str]:
    """The names of the layers that a pattern (``student.*``, with shell wildcards) matches.

    Raises:
        UadtoolError: a pattern matches none.
    """
    layers = QuantizableGraph(detector).layers
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise UadtoolError(f"no layer is named {pattern!r}; the model has {layers[0]}, {layers[1]} "
                               f"... {layers[-1]}")
    return [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]


def layers_outside(detector: Detector, scope: str) -> list[str]:
    """The layers that quantization of this ``scope``, ``student`` or ``all``, leaves alone."""
    return [] if scope == "all" else [name for name in QuantizableGraph(detector).layers
                                      if not name.startswith(f"{detector.trained}.")]


def quantized_graph(graph: QuantizableGraph, quantizer: Callable[[str], ActivationQuantizer], target: Target,
                    float_layers: Collection[str],
                    quantized: Callable[[str, Layer], nn.Module] = lambda name, layer: quantized_layer(layer),
                    ) -> fx.GraphModule:
    """The graph with ``quantizer(name)`` at its points and ``quantized(name, layer)`` for each layer in int8."""
    model = graph.quantized(quantizer, target, float_layers)
    for name in graph.layers:
        if name not in float_layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, Layer)
            model.set_submodule(name, quantized(name, layer))
    return model.eval()
