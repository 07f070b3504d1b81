"""Calibration and post-training quantization of a detector whose batch norm is folded."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from uadtool.detectors.base import Detector
from uadtool.errors import UadtoolError
from uadtool.quantization.graph import place_at_points
from uadtool.quantization.modules import ActivationQuantizer, QuantizedConv2d
from uadtool.quantization.observers import METHODS, Observer
from uadtool.quantization.ranges import Ranges, RangesFile

__all__ = ["METHODS", "TARGETS", "Ranges", "RangesFile", "calibrate", "empty_quantized", "quantize"]

TARGETS = ("onnxruntime",)


def calibrate(detector: Detector, batches: Iterable[Tensor], method: str = "minmax") -> Ranges:
    """Observe the activations at every point while the detector sees batches of images, uint8 [N, H, W, 3].

    Raises:
        UadtoolError: there was no batch.
    """
    observers: dict[str, Observer] = {}

    def observer(name: str) -> Observer:
        observers[name] = METHODS[method]()
        return observers[name]

    model = place_at_points(detector, observer).eval()
    seen = 0
    with torch.inference_mode():
        for batch in batches:
            model(batch)
            seen += len(batch)
    if not seen:
        raise UadtoolError("no image to calibrate on")
    return {name: observer.range() for name, observer in observers.items()}


def quantize(detector: Detector, ranges: Ranges) -> fx.GraphModule:
    """Post-training quantization of all convolutions of all networks; the score head stays float.

    Raises:
        UadtoolError: the ranges are not of this detector's points.
    """
    def quantizer(name: str) -> ActivationQuantizer:
        if name not in ranges:
            raise UadtoolError(f"the ranges lack {name!r}: they were made from another model or by another version; "
                               "run calibrate again")
        return ActivationQuantizer.from_range(*ranges[name])

    model = _quantized_graph(detector, quantizer)
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        conv = modules.get(str(node.target))
        if isinstance(conv, QuantizedConv2d):
            conv.round_bias(modules[str(node.args[0].target)].scale)
    return model


def empty_quantized(detector: Detector) -> fx.GraphModule:
    """The graph that ``quantize`` makes, to load a state dict into."""
    return _quantized_graph(detector, lambda name: ActivationQuantizer())


def _quantized_graph(detector: Detector, quantizer: Callable[[str], ActivationQuantizer]) -> fx.GraphModule:
    model = place_at_points(detector, quantizer)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            model.set_submodule(name, QuantizedConv2d(module))
    return model.eval()
