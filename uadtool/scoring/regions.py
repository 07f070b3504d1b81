"""The anomalous regions of an image, as boxes in its own pixels."""

from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np

from uadtool.data.images import image_size
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.metrics import rounded

FINEST = 2048
"""Rows and columns at most in which regions are looked for. A map has 64 rows for an image of 256, so more would show
nothing new, and the memory stays below 40 MB for images of any size."""


class Region(NamedTuple):
    """Connected pixels above the threshold.

    Attributes:
        box: (left, top, width, height) in pixels of the image as a person sees it (EXIF orientation applied).
        area: number of its pixels.
        peak, mean: of the anomaly map in it, in units of the score.
    """

    box: Tuple[int, int, int, int]
    area: int
    peak: float
    mean: float


def find_regions(anomaly_map: np.ndarray, threshold: float, size: Tuple[int, int]) -> List[Region]:
    """The regions of an anomalous image, the one with the highest peak first.

    The map is enlarged as for masks and contours. Pixels that touch at a corner are connected. There is always one
    region: where enlarging lowers all values to the threshold, it is the highest pixel.

    Args:
        anomaly_map: float32 [h, w].
        threshold: in units of the map, such as ``Prediction.threshold``.
        size: (height, width) of the image, from ``data.images.image_size``. A side longer than ``FINEST`` pixels is
            divided into so many steps, to which boxes are extended.
    """
    from scipy.ndimage import find_objects, label  # slow to import, and needed only for anomalous images

    height, width = (max(cells, min(side, FINEST)) for side, cells in zip(size, anomaly_map.shape))
    values = upsample(anomaly_map, (height, width))
    names, _ = label((values > threshold) | (values == values.max()), structure=np.ones((3, 3)))
    found = []
    for name, (rows, columns) in enumerate(find_objects(names), 1):
        inside = values[rows, columns][names[rows, columns] == name]
        top, down = _stretched(rows, size[0], height)
        left, across = _stretched(columns, size[1], width)
        area = max(1, round(len(inside) * size[0] * size[1] / (height * width)))
        found.append(Region((left, top, across, down), area, rounded(inside.max()),
                            rounded(inside.mean(dtype=np.float64))))
    return sorted(found, key=lambda region: (-region.peak, region.box))


def _stretched(places: slice, side: int, steps: int) -> Tuple[int, int]:
    """Start and length in a side of so many pixels of what takes these of its steps; parts of pixels count."""
    start = places.start * side // steps
    return start, -(-places.stop * side // steps) - start


def regions_of(record: Dict[str, Any], anomaly_map: np.ndarray) -> Dict[str, Any]:
    """The ``regions`` of an ``image`` record and its map, float32 [h, w], if the image is anomalous.

    Raises:
        ImageError: the image no longer exists.
    """
    if not record["anomalous"]:
        return {}
    found = find_regions(anomaly_map, record["threshold"], image_size(record["path"]))
    return {"regions": [region._asdict() for region in found]}
