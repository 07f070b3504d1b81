"""Which layers lose most in int8, measured without labels by how far the anomaly maps move."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor, nn

from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.quantization.bias_correction import BiasCorrection
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import Target
from uadtool.scoring.anomaly_maps import OUTSIDE


def layer_sensitivity(plan: QuantizationPlan, ranges: Ranges, target: Target, images: Sequence[Tensor],
                      layers: Iterable[str],
                      correction: Optional[BiasCorrection] = None) -> Iterator[tuple[str, float]]:
    """Quantize one layer at a time; yields the name of each and its ``map_distance`` from the float detector.

    Args:
        images: batches of uint8 [N, H, W, 3]: good images and, preferably, synthetic anomalies.
        layers: by name.
        correction: corrects the bias of the layer, as in ``quantize``.
    """
    target = replace(target, half=False)  # CPUs are slow at fp16, and the rounding to int8 is what counts
    expected = anomaly_maps(plan.traced, images)
    for layer in layers:
        quantized = quantize(plan, ranges, target, [name for name in plan.layers if name != layer], correction)
        yield layer, map_distance(expected, anomaly_maps(quantized, images))


@torch.inference_mode()
def anomaly_maps(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """The anomaly maps of all images: float32 [N, h, w]."""
    return torch.cat([OutputTensors(*model(batch)).anomaly_map for batch in images])


def map_distance(expected: Tensor, actual: Tensor) -> float:
    """Root mean square difference of anomaly maps [N, h, w], in their unit: deviations of good images' scores."""
    return float(torch.sub(*in_both(expected, actual)).square().mean().sqrt())


def in_both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The values of anomaly maps where both lie in a region of interest: classes, and so regions, may differ."""
    inside = (one != OUTSIDE) & (other != OUTSIDE)
    return one[inside], other[inside]
