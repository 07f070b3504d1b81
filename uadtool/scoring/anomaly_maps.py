"""Anomaly maps in the size of an image."""

from typing import Tuple

import numpy as np
from PIL import Image

OUTSIDE = -1000.0
"""Value of an anomaly map outside the region of interest: below those of images, and exact in fp16."""


def upsample(anomaly_map: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize a float32 map [h, w] to ``size`` (height, width) bilinearly, pixel centres aligned.

    Only values inside the region of interest count. Outside it pixels are ``OUTSIDE``.
    """
    inside = inside_roi(anomaly_map)
    if inside.all():
        return _resized(anomaly_map, size)
    share = _resized(inside.astype(np.float32), size)
    values = _resized(np.where(inside, anomaly_map, np.float32(0)), size) / np.maximum(share, np.float32(0.01))
    return np.where(share >= 0.5, values, np.float32(OUTSIDE))


def inside_roi(anomaly_map: np.ndarray) -> np.ndarray:
    """Where a map of any size lies inside the region of interest: bool."""
    inside: np.ndarray = anomaly_map != OUTSIDE
    return inside


def _resized(values: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
