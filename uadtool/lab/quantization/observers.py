"""Calibration methods: each sees the activations of one point, batch by batch, and chooses a range.

All work in constant memory, for any number of images.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.histogram import BINS, Histogram


class Observer(nn.Module, ABC):
    """Passes its input on and keeps what ``range`` requires."""

    def __init__(self) -> None:
        super().__init__()
        self.minimum, self.maximum = torch.inf, -torch.inf

    @abstractmethod
    def observe(self, values: Tensor) -> None:
        """Observe the activations of one batch, [N, ...].

        Raises:
            UadtoolError: an activation is not finite.
        """

    def range(self) -> tuple[float, float]:
        """The chosen (minimum, maximum), within the observed values; call ``observe`` first."""
        return self.minimum, self.maximum

    def forward(self, values: Tensor) -> Tensor:
        self.observe(values.detach())
        return values


class MinMax(Observer):
    """The smallest and the largest value (Jacob et al., CVPR 2018, section 3.1 without the averaging)."""

    def observe(self, values: Tensor) -> None:
        low, high = _extremes(values)
        self.minimum = min(self.minimum, low)
        self.maximum = max(self.maximum, high)


class MovingAverage(Observer):
    """The smallest and the largest value of an image, averaged over the images (the first dimension of a batch).

    The first 100 images have equal weight, as in ONNX Runtime's ``moving_average``; after them the average is
    exponential with a constant of 0.01 (Jacob et al., CVPR 2018, section 3.1, with the constant of torch.ao's
    MovingAverageMinMaxObserver). The batch size does not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.minimum = self.maximum = 0.0

    def observe(self, values: Tensor) -> None:
        for image in values:
            low, high = _extremes(image)
            self.images += 1
            step = max(1 / self.images, 0.01)
            self.minimum += step * (low - self.minimum)
            self.maximum += step * (high - self.maximum)


class HistogramObserver(MinMax):
    """Chooses a range from a histogram of all values."""

    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def observe(self, values: Tensor) -> None:
        super().observe(values)
        self.histogram.add(values, max(-self.minimum, self.maximum))

    def range(self) -> tuple[float, float]:
        low, high = self._choose()
        return max(low, self.minimum), min(high, self.maximum)

    @abstractmethod
    def _choose(self) -> tuple[float, float]:
        """The range before it is cut to the observed values."""


class Percentile(HistogramObserver):
    """The range that holds a given percentage of all values, including zeros.

    It leaves out the highest values if none is negative, otherwise half at either end (ONNX Runtime's
    PercentileCalibrater, symmetric and asymmetric; Wu et al., arXiv:2004.09602).

    Args:
        percentile: percentage of the values to hold, above 0 and at most 100.
    """

    def __init__(self, percentile: float) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise UadtoolError(f"the percentile must be above 0 and at most 100, not {percentile}")
        self.percentile = percentile

    def _choose(self) -> tuple[float, float]:
        cumulative = np.cumsum(self.histogram.counts)
        left_out = (1 - self.percentile / 100) * cumulative[-1]
        below = left_out / 2 if self.minimum < 0 else 0
        first = np.searchsorted(cumulative, below, side="right")
        last = np.searchsorted(cumulative, cumulative[-1] - (left_out - below))
        edges = self.histogram.edges
        return edges[first].item(), edges[last + 1].item()


class Entropy(HistogramObserver):
    """The threshold on magnitudes at which 128 levels keep most information: least Kullback-Leibler divergence.

    TensorRT's method (S. Migacz, "8-bit Inference with TensorRT", GTC 2017): a candidate keeps the bins below the
    threshold and adds the counts of all others to its last bin. It is compared with the kept bins after each of 128
    levels has spread its count evenly over its bins that are not empty. Zeros are left out. A point with negative
    values gets the threshold on both sides. The 128 levels are those of s8.
    """

    LEVELS = 128

    def _choose(self) -> tuple[float, float]:
        counts = self.histogram.counts_without_zeros()
        threshold = self._bins_to_keep(counts[BINS:] + counts[BINS - 1::-1]) * self.histogram.limit / BINS
        return -threshold, threshold

    def _bins_to_keep(self, counts: NDArray[np.int64]) -> int:
        """The number of bins of the magnitudes below the threshold."""
        sizes = np.flatnonzero(counts) + 1  # an empty last bin cannot stand for the values above it
        sizes = sizes[sizes >= self.LEVELS]
        if not len(sizes):
            return BINS
        bounds = sizes[:, None] * np.arange(self.LEVELS + 1) // self.LEVELS
        in_level = np.diff(_running_sum(counts)[bounds])
        bins_in_level = np.diff(_running_sum(counts > 0)[bounds])
        total, kept, last = counts.sum(), in_level.sum(1), counts[sizes - 1]
        # sum of p ln p - p ln q: p with the values above the threshold in its last bin, q spread evenly
        own = _running_sum(xlogy(counts, counts))[sizes] - xlogy(last, last)
        own += xlogy(last + total - kept, last + total - kept)
        spread = in_level / np.maximum(bins_in_level, 1) / kept[:, None]
        in_level[:, -1] += total - kept
        divergence = (own - xlogy(in_level, spread).sum(1)) / total - np.log(total)
        widest = np.flatnonzero(divergence <= divergence.min() + 1e-9)[-1]  # among those equal except for rounding
        return int(sizes[widest])


class MeanSquaredError(HistogramObserver):
    """The range whose 256 codes give the least mean squared error, rounding and clipping together.

    The target tensorrt, whose codes are symmetric, widens it.

    The error is integrated over the bins, with values spread evenly within each, as in FBGEMM's search and torch.ao's
    HistogramObserver. These move one end at a time until the error first grows; this method tries pairs (minimum,
    maximum) on a grid that it refines three times, down to 1 %.
    """

    def _choose(self) -> tuple[float, float]:
        lowest, highest = low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)  # a range always includes 0
        around = np.linspace(-1, 1, 9)
        for octaves in (np.arange(-11, 1), around, around / 4, around / 16):
            lows, highs = np.meshgrid(np.unique(np.maximum(low * 2.0 ** octaves, lowest)),
                                      np.unique(np.minimum(high * 2.0 ** octaves, highest)))
            best = np.argmin(self._error(lows.ravel(), highs.ravel()))
            low, high = lows.flat[best].item(), highs.flat[best].item()
        return low, high

    def _error(self, lows: NDArray[np.float64], highs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of squared errors of each range, rounded as by ``ActivationQuantizer.from_range``."""
        scale = np.maximum((highs - lows) / 255, 1e-8)[:, None]
        first = np.rint(lows[:, None] / scale)
        edges = self.histogram.edges
        codes = np.clip(np.rint(edges / scale), first, first + 255)
        distance = edges - codes * scale
        # integral of the squared distance from 0 on: each whole code on the way adds scale^3 / 12
        integral = codes * scale ** 3 / 12 + distance * distance * distance / 3
        error: NDArray[np.float64] = np.diff(integral) @ self.histogram.counts_without_zeros()
        return error


METHODS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMax, "moving-average": MovingAverage, "percentile": Percentile, "entropy": Entropy,
    "mse": MeanSquaredError,
}


def make_observer(method: str, percentile: float = 99.99) -> Observer:
    """The observer of one point; only the method ``percentile`` uses ``percentile``.

    Raises:
        UadtoolError: the percentile is not above 0 and at most 100.
    """
    return Percentile(percentile) if method == "percentile" else METHODS[method]()


def _extremes(values: Tensor) -> tuple[float, float]:
    low, high = (bound.item() for bound in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UadtoolError("the model gives activations that are not finite; train it again")
    return low, high


def _running_sum(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0], np.cumsum(values)])
