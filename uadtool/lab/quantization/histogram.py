"""A histogram of all activations at one point, in constant memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 4096
"""Bins on either side of 0. The largest magnitude lies in the upper half of them."""
SMALLEST_LIMIT = 2.0 ** -20
"""Initial limit of a histogram: the narrowest quantizer, 255 codes of 1e-8, spans more."""


class Histogram:
    """Counts of values in bins of equal width, from ``-limit`` to ``limit``; 0 is an edge.

    The limit is a power of two. When a value lies outside, the limit is doubled and neighbouring bins are merged. No
    count is lost or split, and the result depends only on the values, not on their order or batches.
    """

    def __init__(self) -> None:
        self.limit = SMALLEST_LIMIT
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS, np.int64)

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bounds of the bins, [2 * BINS + 1]; a bin includes its lower bound."""
        return np.linspace(-self.limit, self.limit, 2 * BINS + 1)

    def add(self, values: Tensor, magnitude: float) -> None:
        """Count finite values [N, ...] of at most this magnitude."""
        while magnitude >= self.limit:
            self.limit *= 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 2)
        for image in values:  # one by one, so that the temporary copies stay small
            bins = (image * (BINS / self.limit)).floor_().int().add_(BINS)
            self.counts += torch.bincount(bins.flatten(), minlength=2 * BINS).numpy()

    def counts_without_zeros(self) -> NDArray[np.int64]:
        """The counts, with the count of the bin of 0 replaced by that of the next bin.

        After a ReLU half of all values are exactly 0. They cost nothing in any range, since 0 always has a code, but
        would outweigh all others (likewise ``bins[0] = bins[1]`` in NVIDIA's pytorch-quantization, calib/histogram.py).
        """
        counts = self.counts.copy()
        counts[BINS] = counts[BINS + 1]
        return counts
