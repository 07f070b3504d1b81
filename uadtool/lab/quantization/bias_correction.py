"""Bias correction: the shift that rounding adds to the mean of a channel is subtracted from its bias.

The weights of an edge filter sum to zero, but no longer once they are rounded: the filter responds to plain brightness,
and every layer after it sees shifted features. Most of what EfficientNet-Lite loses in int8 comes from a few such
filters in its first blocks.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from uadtool.lab.quantization.modules import Layer, QuantizedLayer
from uadtool.lab.quantization.plan import QuantizationPlan

CORRECTION_IMAGES = 32


class BiasCorrection:
    """Shifts the bias of each quantized layer so that each channel keeps its float mean.

    Empirical bias correction (Nagel et al., ICCV 2019, arXiv 1906.04721, appendix D), layer by layer: each layer sees
    the outputs of the corrected layers before it.

    Args:
        plan: of the float detector.
        images: good images, uint8 [N, H, W, 3], all in one batch.
    """

    @torch.inference_mode()
    def __init__(self, plan: QuantizationPlan, images: Tensor) -> None:
        means: dict[str, Tensor] = {}
        self._images, self._means = images, means

        class Recorder(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                result = super().call_module(target, args, kwargs)
                layer = self.module.get_submodule(target)
                if isinstance(layer, Layer):
                    means[target] = _channel_means(result, 1 if isinstance(layer, nn.Conv2d) else -1)
                return result

        Recorder(plan.traced).run(images)

    @torch.inference_mode()
    def apply(self, quantized: fx.GraphModule) -> None:
        """Correct the biases of a quantized graph of the detector, in place."""
        means, needed = self._means, _needed_nodes(quantized)

        class Corrector(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                return super().run_node(n) if n in needed else None

            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                result = super().call_module(target, args, kwargs)
                layer = self.module.get_submodule(target)
                if isinstance(layer, QuantizedLayer):
                    shift = means[target] - _channel_means(result, layer.channel_axis)
                    layer.bias += shift
                    result = (result.movedim(layer.channel_axis, -1) + shift).movedim(-1, layer.channel_axis)
                return result

        Corrector(quantized).run(self._images)


def _needed_nodes(quantized: fx.GraphModule) -> set[fx.Node]:
    """The quantized layers and all nodes before them: few if one layer is quantized, as for ``layer_sensitivity``."""
    needed = set[fx.Node]()
    for node in reversed(quantized.graph.nodes):
        layer = node.op == "call_module" and isinstance(quantized.get_submodule(str(node.target)), QuantizedLayer)
        if layer or not needed.isdisjoint(node.users):
            needed.add(node)
    return needed


def _channel_means(values: Tensor, channel_axis: int) -> Tensor:
    """[C]: means over all other axes."""
    channels = channel_axis % values.dim()
    return values.mean([axis for axis in range(values.dim()) if axis != channels])
