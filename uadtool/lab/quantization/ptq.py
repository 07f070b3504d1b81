"""Post-training quantization."""

from collections.abc import Callable, Collection
from typing import Optional

from torch import fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.graph import in_half_precision, insert_quantizers
from uadtool.lab.quantization.modules import ActivationQuantizer, Quantizable, QuantizedConv2d, quantized_layer
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import TARGETS, Target


def quantize(plan: QuantizationPlan, ranges: Ranges, target: Target = TARGETS["onnxruntime"],
             float_layers: Collection[str] = (), correction: Optional[BiasCorrection] = None) -> fx.GraphModule:
    """Quantize the layers of all networks; the score head stays float.

    Args:
        float_layers: names of layers that also stay float.
        correction: corrects the biases.

    Raises:
        UadtoolError: the ranges do not belong to the points of this plan.
    """
    points = set(plan.points.values())
    if points != ranges.keys():
        first = min(points ^ ranges.keys())
        raise UadtoolError(f"the ranges {'lack' if first in points else 'have'} {first!r}: they were made from another "
                           "model or by another version; run calibrate again")
    model = quantized_graph(plan, lambda name: ActivationQuantizer.from_range(*ranges[name], target.signed), target,
                            float_layers)
    if correction:
        correction.apply(model)
    if target.integer_bias:
        _round_biases(model)
    return model


def empty_quantized(plan: QuantizationPlan, precision: str, target: Target,
                    float_layers: Collection[str] = ()) -> fx.GraphModule:
    """The graph that ``in_half_precision`` (fp16) or ``quantize`` makes, to load a state dict into."""
    if precision == "fp16":
        return in_half_precision(plan)
    return quantized_graph(plan, lambda name: ActivationQuantizer(target.signed), target, float_layers)


def quantized_graph(plan: QuantizationPlan, quantizer: Callable[[str], ActivationQuantizer], target: Target,
                    float_layers: Collection[str],
                    quantized: Optional[Callable[[str, Quantizable], nn.Module]] = None) -> fx.GraphModule:
    """The graph with ``quantizer(name)`` at its points and layers in int8: ``quantized(name, layer)``, if given."""
    if target.half:  # TensorRT takes no integer tables
        float_layers = {*float_layers, *plan.memories}
    model = insert_quantizers(plan, quantizer, target, float_layers)
    for name in plan.layers:
        if name not in float_layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, Quantizable)
            model.set_submodule(name, quantized(name, layer) if quantized else quantized_layer(layer, target))
    return model.eval()


def _round_biases(model: fx.GraphModule) -> None:
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        conv = modules.get(str(node.target))
        if isinstance(conv, QuantizedConv2d):
            conv.round_bias(modules[str(node.args[0].target)].scale)
