"""Calibration: the range of the activations at every point."""

from collections.abc import Iterable

import torch
from torch import Tensor

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.graph import observe
from uadtool.lab.quantization.observers import Observer, make_observer
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ranges import Ranges


def calibrate(plan: QuantizationPlan, batches: Iterable[Tensor], method: str = "mse",
              percentile: float = 99.99) -> Ranges:
    """Observe the activations at every point while the detector sees batches of images [N, H, W, 3].

    Args:
        batches: uint8 pixels, or float32 to calibrate on values outside 0..255.
        method: one of ``METHODS``.
        percentile: for the method ``percentile``, above 0 and at most 100.

    Raises:
        UadtoolError: there is no batch.
    """
    model = observe(plan, lambda name: make_observer(method, percentile)).eval()
    seen = 0
    with torch.inference_mode():
        for batch in batches:
            model(batch)
            seen += len(batch)
    if not seen:
        raise UadtoolError("no image to calibrate on")
    observers = model.get_submodule("points").named_children()
    return {name: observer.range() for name, observer in observers if isinstance(observer, Observer)}
