"""Calibration methods: each sees the activations of one point, batch by batch, and chooses a range.

All work in constant memory, however many images there are.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Observer(nn.Module, ABC):
    """Passes its input on and remembers what it needs for ``range``."""

    @abstractmethod
    def observe(self, values: Tensor) -> None:
        """Take in the activations of one batch, any shape."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The chosen (minimum, maximum); only after ``observe``."""

    def forward(self, values: Tensor) -> Tensor:
        self.observe(values.detach())
        return values


class MinMax(Observer):
    """The smallest and the largest value ever seen (Jacob et al., CVPR 2018, section 3.1 without the averaging)."""

    def __init__(self) -> None:
        super().__init__()
        self.minimum, self.maximum = torch.inf, -torch.inf

    def observe(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        self.minimum = min(self.minimum, low.item())
        self.maximum = max(self.maximum, high.item())

    def range(self) -> tuple[float, float]:
        return self.minimum, self.maximum


METHODS: dict[str, type[Observer]] = {"minmax": MinMax}
