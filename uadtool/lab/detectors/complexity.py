"""The size of a detector: parameters and multiply-accumulates."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(detector: nn.Module) -> int:
    """Weights and biases of all networks, and the entries of memories."""
    return sum(parameter.numel() for parameter in detector.parameters())


def count_macs(detector: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of all convolutions and matrix products for one image; the score head is negligible."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        detector(torch.zeros(1, *image_size, 3, dtype=torch.uint8))
    return int(counter.get_total_flops()) // 2
