"""Which layers lose most in int8? Told without labels, from how far the anomaly maps move."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor, nn

from uadtool.lab.detectors.contract import Detector, OutputTensors
from uadtool.lab.quantization.graph import QuantizableGraph
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target


def layer_sensitivity(detector: Detector, ranges: Ranges, target: Target, images: Sequence[Tensor],
                      layers: Iterable[str], correction: Optional[Tensor] = None) -> Iterator[tuple[str, float]]:
    """Quantize one layer at a time: yields each one's name and its ``map_distance`` from the float detector.

    Args:
        images: batches of uint8 [N, H, W, 3], good ones and, better, synthetic anomalies, too.
        layers: by name.
        correction: images to correct the layer's bias with, as ``quantize`` does.
    """
    everything = QuantizableGraph(detector).layers
    target = replace(target, half=False)  # CPUs are slow at fp16, and the rounding to int8 is what counts
    expected = anomaly_maps(detector, images)
    for layer in layers:
        quantized = quantize(detector, ranges, target, [name for name in everything if name != layer], correction)
        yield layer, map_distance(expected, anomaly_maps(quantized, images))


@torch.inference_mode()
def anomaly_maps(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """float32 [N, h, w] of all images."""
    return torch.cat([OutputTensors(*model(batch)).anomaly_map for batch in images])


def map_distance(expected: Tensor, found: Tensor) -> float:
    """Root mean square difference of anomaly maps [N, h, w], in their unit: deviations of good images' scores."""
    return float((expected - found).square().mean().sqrt())
