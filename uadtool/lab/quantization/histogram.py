"""A histogram of everything that one point of a network ever showed, in constant memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 4096
"""Bins on either side of 0. The largest magnitude lies in the upper half of them."""
SMALLEST_LIMIT = 2.0 ** -20
"""Where a histogram starts: the narrowest quantizer, 255 codes of 1e-8, spans more."""


class Histogram:
    """Counts of values in bins of equal width, from ``-limit`` to ``limit``; 0 is an edge.

    The limit is a power of two. When a value lies outside, the limit is doubled and neighbouring bins are merged. So no
    count is lost or split, and the result depends on the values alone: not on their order, nor on how they are batched.
    """

    def __init__(self) -> None:
        self.limit = SMALLEST_LIMIT
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS, np.int64)

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bounds of the bins, [2 * BINS + 1]; a bin holds its lower bound."""
        return np.linspace(-self.limit, self.limit, 2 * BINS + 1)

    def add(self, values: Tensor, magnitude: float) -> None:
        """Count finite values [N, ...], none of which is larger than ``magnitude``, without the sign."""
        while magnitude >= self.limit:
            self.limit *= 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 2)
        for image in values:  # one by one, so that the temporary copies stay small
            bins = (image * (BINS / self.limit)).floor_().int().add_(BINS)
            self.counts += torch.bincount(bins.flatten(), minlength=2 * BINS).numpy()

    def counts_without_zeros(self) -> NDArray[np.int64]:
        """The counts, but the bin of 0 has that of the next one.

        After a ReLU half of all values are exactly 0. They cost nothing whatever the range is, as 0 always has a code,
        but would outweigh all others (likewise ``bins[0] = bins[1]`` in NVIDIA's pytorch-quantization,
        calib/histogram.py).
        """
        counts = self.counts.copy()
        counts[BINS] = counts[BINS + 1]
        return counts
