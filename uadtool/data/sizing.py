"""The size to read images at: of their shape, and with a given number of pixels."""

import math
from statistics import median
from typing import Dict, List, Sequence, Tuple

from uadtool.data.images import ImageError, image_size
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.terminal import first_of, log

MULTIPLE = 32
"""Sides are multiples of the largest stride of a teacher, in pixels."""
LONGEST = 4096
"""Longest side of an input, in pixels."""
SQUEEZED = 1.25
"""Change of the ratio of the sides of an image from which a warning says so."""


def suitable_size(samples: Sequence[Sample], side: int) -> Tuple[int, int]:
    """(height, width) with the median ratio of the sides of all images and about ``side`` x ``side`` pixels.

    A warning names classes whose images have another shape. Images that cannot be read do not count.

    Raises:
        UadtoolError: no image can be read.
    """
    ratios: Dict[str, List[float]] = {}
    for sample in samples:
        try:
            height, width = image_size(sample.path)
        except ImageError:
            continue
        ratios.setdefault(str(sample.class_name), []).append(height / width)
    if not ratios:
        raise UadtoolError("no image can be read, so none shows a size; check the data with train --check")
    size = size_of(median(ratio for values in ratios.values() for ratio in values), side)
    log.info("images are read at %dx%d pixels (height x width)", *size)
    warn_of_squeezed({name: median(values) for name, values in ratios.items()}, size)
    return size


def size_of(ratio: float, side: int) -> Tuple[int, int]:
    """(height, width) in multiples of ``MULTIPLE``, near height / width = ``ratio`` and ``side`` ** 2 pixels."""
    def rounded(pixels: float) -> int:
        return min(LONGEST, max(MULTIPLE, round(pixels / MULTIPLE) * MULTIPLE))

    return rounded(side * math.sqrt(ratio)), rounded(side / math.sqrt(ratio))


def warn_of_squeezed(ratios: Dict[str, float], size: Tuple[int, int]) -> None:
    """Warn of classes whose images (height / width) have another shape than the size that they are read at."""
    own = size[0] / size[1]
    squeezed = [name for name, ratio in sorted(ratios.items()) if max(ratio / own, own / ratio) > SQUEEZED]
    if squeezed:
        log.warning("images of %s have another shape than %dx%d, and are squeezed; their defects are, too",
                    first_of(squeezed, "classes"), *size)
