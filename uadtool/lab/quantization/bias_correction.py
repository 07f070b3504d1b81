"""Bias correction: what rounding adds to the mean of a channel is taken away from its bias.

A filter whose weights add up to nothing does so no longer once they are rounded: it answers to plain brightness, and
every layer after it sees features from somewhere else. Most of what EfficientNet-Lite loses in int8 comes from a few
such filters in its first blocks.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.modules import QuantizedLayer

CORRECTION_IMAGES = 32


@torch.inference_mode()
def correct_biases(detector: nn.Module, quantized: fx.GraphModule, images: Tensor) -> None:
    """Shift the bias of each quantized layer, in place, so that the mean of each channel is the float one's.

    Empirical bias correction (Nagel et al., ICCV 2019, arXiv 1906.04721, appendix D), layer by layer: each sees what
    the corrected ones before it give.

    Args:
        detector: the float one.
        quantized: its quantized graph.
        images: good ones, uint8 [N, H, W, 3], all in one batch.
    """
    means: dict[str, Tensor] = {}
    graph = QuantizableGraph(detector)

    class Reference(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_module(target, args, kwargs)
            layer = quantized.get_submodule(target) if target in graph.layers else None
            if isinstance(layer, QuantizedLayer):
                means[target] = _channel_means(result, layer)
            return result

    class Corrector(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_module(target, args, kwargs)
            layer = self.module.get_submodule(target)
            if isinstance(layer, QuantizedLayer):
                shift = means[target] - _channel_means(result, layer)
                layer.bias += shift
                result = (result.movedim(layer.channel_axis, -1) + shift).movedim(-1, layer.channel_axis)
            return result

    Reference(graph.module).run(images)
    Corrector(quantized).run(images)


def _channel_means(values: Tensor, layer: QuantizedLayer) -> Tensor:
    """[C], of what the layer gives."""
    channels = layer.channel_axis % values.dim()
    return values.mean([axis for axis in range(values.dim()) if axis != channels])
