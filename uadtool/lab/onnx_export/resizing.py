"""Resizing inside the graph: a detector that takes a camera's own pixels."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from uadtool.errors import UadtoolError

BLOCK = 16
"""Rows or columns of the result that are computed together. Few inputs have a weight in them, and the rest is left out:
from 1080 x 1920 to 256 x 256 pixels the two products take 12 ms on one core, and 50 ms with whole matrices."""

Size = tuple[int, int]


class Resizing(nn.Module):
    """Resizes images as Pillow does (bilinear, antialiased): rows, then columns, each with a result of 8 bits.

    Each of the two is a product with a constant matrix, in blocks of its band. Weights in float32 differ from Pillow's
    22 bits in one of some thousand pixels, by one grey level.

    Args:
        before, after: (height, width).
    """

    def __init__(self, before: Size, after: Size) -> None:
        super().__init__()
        self.before, self.after = before, after
        self._rows = [(start, torch.from_numpy(block)) for start, block in _blocks(before[0], after[0])]
        # A row of pixels is 3 W numbers: the three channels share the weights of their pixel.
        channels = np.eye(3, dtype=np.float32)
        self._columns = [(3 * start, torch.from_numpy(np.kron(block, channels).T.copy()))
                         for start, block in _blocks(before[1], after[1])]

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> whole numbers from 0 to 255, float32 [N, h, w, 3]."""
        pixels = image.float().flatten(2)  # cast first: TensorRT cannot slice uint8
        pixels = torch.cat([pixels[:, :, start:start + len(weights)] @ weights for start, weights in self._columns], 2)
        pixels = torch.floor(pixels + 0.5)
        pixels = torch.cat([weights @ pixels[:, start:start + weights.shape[1]] for start, weights in self._rows], 1)
        return torch.floor(pixels + 0.5).view(-1, *self.after, 3)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return (self.before[0] * sum(weights.numel() for _, weights in self._columns)
                + 3 * self.after[1] * sum(weights.numel() for _, weights in self._rows))


class ResizingDetector(nn.Module):
    """A detector, or a graph that was made from it, that takes images of another size and resizes them.

    Args:
        before, after: as for ``Resizing``.
    """

    def __init__(self, detector: nn.Module, before: Size, after: Size) -> None:
        super().__init__()
        self.resizing, self.detector = Resizing(before, after), detector

    def forward(self, image: Tensor) -> Any:
        """uint8 [N, H, W, 3] -> ``OutputTensors``."""
        return self.detector(self.resizing(image))


def _blocks(before: int, after: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The weights of each ``BLOCK`` of outputs, [outputs, inputs], and the first of these inputs."""
    weights = bilinear_weights(before, after).astype(np.float32)
    for start in range(0, after, BLOCK):
        block = weights[start:start + BLOCK]
        used = np.flatnonzero(block.any(0))
        yield int(used[0]), block[:, used[0]:used[-1] + 1]


def bilinear_weights(before: int, after: int) -> NDArray[np.float64]:
    """The weight of each input in each output pixel, [after, before]; each row adds up to 1.

    Source: ``precompute_coeffs`` of Pillow's libImaging/Resample.c. It is described in data/README.md.
    """
    scale = before / after
    reach = max(scale, 1.0)
    centres = (np.arange(after)[:, None] + 0.5) * scale
    weights: NDArray[np.float64] = np.maximum(0, 1 - np.abs(np.arange(before) + 0.5 - centres) / reach)
    weights /= weights.sum(1, keepdims=True)
    return weights


def check_resizing(resizing: Resizing, images: NDArray[np.uint8]) -> int:
    """The largest difference from Pillow, in grey levels, on images [N, H, W, 3] and on noise.

    Raises:
        UadtoolError: it is more than one.
    """
    largest = 0
    for pixels in itertools.chain(images, _noise(resizing.before)):
        with torch.inference_mode():
            resized = resizing(torch.from_numpy(pixels[None]))[0].numpy()
        expected = Image.fromarray(pixels).resize(resizing.after[::-1], Image.Resampling.BILINEAR)
        largest = max(largest, int(np.abs(resized - np.asarray(expected)).max()))
    if largest > 1:
        raise UadtoolError(f"the exported graph resizes images by up to {largest} grey levels unlike Pillow; nothing "
                           "was written")
    return largest


def _noise(size: Size) -> Iterator[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    yield random.integers(0, 256, (*size, 3), np.uint8)
    yield 255 * random.integers(0, 2, (*size, 3), np.uint8)
