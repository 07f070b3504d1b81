"""How large a detector is: parameters and multiply-accumulates."""

import torch
from torch import Tensor, nn


def count_parameters(detector: nn.Module) -> int:
    """Weights and biases of all networks."""
    return sum(p.numel() for p in detector.parameters())


def count_macs(detector: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-accumulates of all convolutions for one image; the score head is negligible."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += result[0].numel() * weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in detector.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        detector(torch.zeros(1, *image_size, 3, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return total
