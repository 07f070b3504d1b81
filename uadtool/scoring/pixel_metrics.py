"""Pixel AUROC and AUPRO of a stream of anomaly maps."""

import base64
import json
import zlib
from typing import Any, Dict, NamedTuple, Optional

import numpy as np

from uadtool.scoring.anomaly_maps import inside_roi
from uadtool.scoring.metrics import area_under, area_under_roc, counts_above

_UNPACKED = 8 << 20  # bytes of unpacked pixel counts at most: 65,536 bins take less
_BINS = 1 << 16
_REGION = 1 << 40  # weight of a region, an integer so that sums do not depend on the order of images


class PixelCounts(NamedTuple):
    """The pixels of one image; see ``count_pixels``. All arrays are [n], for the n bins that are not empty.

    ``good`` and ``anomalous`` are numbers of pixels. ``overlap`` sums the weights of anomalous pixels: the pixels of a
    region weigh 2 ** 40 together. ``regions`` is the number of regions.
    """

    bins: np.ndarray
    good: np.ndarray
    anomalous: np.ndarray
    overlap: np.ndarray
    regions: int


def count_pixels(anomaly_map: np.ndarray, mask: np.ndarray) -> PixelCounts:
    """Count an image: float32 [H, W] and its ground truth, bool [H, W] (all False for a good image).

    Pixels outside the region of interest do not count, nor does what a defect has there.

    Raises:
        ValueError: the shapes differ or the map holds a NaN.
    """
    if anomaly_map.shape != mask.shape:
        raise ValueError(f"the anomaly map is {anomaly_map.shape}, its mask {mask.shape}")
    if np.isnan(anomaly_map).any():
        raise ValueError("the anomaly map holds values that are not numbers")
    halves, inside = _upper_halves(anomaly_map), inside_roi(anomaly_map)
    if inside.all():
        total = np.bincount(halves.ravel(), minlength=_BINS)
    else:
        total, mask = np.bincount(halves[inside], minlength=_BINS), mask & inside
    filled = np.flatnonzero(total > 0)
    # The halves of positive numbers ascend. Those of negative numbers follow and descend.
    bins = np.where(filled < _BINS // 2, filled + _BINS // 2, _BINS - 1 - filled)
    if not mask.any():
        nothing = np.zeros(len(filled), np.int64)
        return PixelCounts(bins, total[filled], nothing, nothing, 0)
    from scipy.ndimage import label  # slow to import, and needed only with masks

    box = tuple(slice(places[0], places[-1] + 1)
                for places in (np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))))
    mask, halves = mask[box], halves[box]  # defects are small, and labelling reads every pixel
    names, regions = label(mask, structure=np.ones((3, 3)))
    names, halves = names[mask] - 1, halves[mask]
    weights = np.rint(_REGION / np.bincount(names))[names]
    anomalous = np.bincount(halves, minlength=_BINS)[filled]
    overlap = np.bincount(halves, weights, minlength=_BINS)[filled].astype(np.int64)
    return PixelCounts(bins, total[filled] - anomalous, anomalous, overlap, regions)


def _upper_halves(values: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32 values. Adding zero makes -0.0 equal to 0.0."""
    bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


class PixelMetrics:
    """Pixel AUROC and AUPRO of a stream of anomaly maps, in about 1.5 MB for any number of images.

    Pixels are counted in a fixed grid of 65,536 bins: the upper half of float32 in numeric order. A bin is at most
    1/128 of its value wide, so the range need not be known beforehand. The grid is finest around zero, where the scores
    of good images lie. Figures are within 0.0005 of the exact figures there, but useless for a map whose whole spread
    is less than 1/128 of its offset.
    """

    def __init__(self) -> None:
        self._good = np.zeros(_BINS, np.int64)
        self._anomalous = np.zeros(_BINS, np.int64)
        self._overlap = np.zeros(_BINS, np.int64)  # a pixel weighs _REGION / area of its region
        self._regions = 0

    def add(self, image: PixelCounts) -> None:
        """Add one image."""
        self._good[image.bins] += image.good
        if image.regions:
            self._anomalous[image.bins] += image.anomalous
            self._overlap[image.bins] += image.overlap
            self._regions += image.regions

    def merge(self, other: "PixelMetrics") -> None:
        """Add the images of ``other``."""
        self._good += other._good
        self._anomalous += other._anomalous
        self._overlap += other._overlap
        self._regions += other._regions

    def to_json(self) -> Dict[str, Any]:
        """All counts, to be merged elsewhere: usually 5 to 35 KB of text for any number of images.

        ``regions`` is the number of regions. ``bins`` is the base64 of zlib-compressed JSON: four lists about the bins
        that are not empty, ascending: distance from the previous bin, good pixels, anomalous pixels, overlap.
        """
        filled = np.flatnonzero(self._good + self._anomalous)
        lists = [np.diff(filled, prepend=0), self._good[filled], self._anomalous[filled], self._overlap[filled]]
        text = json.dumps([values.tolist() for values in lists], separators=(",", ":"))
        return {"regions": self._regions, "bins": base64.b64encode(zlib.compress(text.encode(), 9)).decode()}

    @classmethod
    def from_json(cls, counted: Dict[str, Any]) -> "PixelMetrics":
        """The opposite of ``to_json``.

        Raises:
            ValueError: ``to_json`` did not write it.
        """
        pixels = cls()
        try:
            distances, good, anomalous, overlap = _unpacked(counted["bins"])
            bins = np.cumsum(distances)
            if not distances[1:].all():
                raise ValueError("a bin occurs twice")
            if max(good.sum(dtype=float), anomalous.sum(dtype=float)) >= 2 ** 53:
                raise ValueError("too many pixels")
            regions, area = counted["regions"], int(anomalous.sum())
            if type(regions) is not int or not 0 <= regions <= area:
                raise ValueError(f"{area} anomalous pixels cannot have {regions!r:.40} regions")
            # The weight of each pixel was rounded. The float sum finds an integer sum that would overflow.
            if overlap.sum(dtype=float) >= 2 ** 62 or int(overlap.sum()) > _REGION * regions + area:
                raise ValueError(f"the overlap exceeds that of {regions} regions")
            pixels._good[bins], pixels._anomalous[bins], pixels._overlap[bins] = good, anomalous, overlap
            pixels._regions = regions
        except (IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"its pixel counts cannot be read: {error}") from error
        return pixels

    def auroc(self) -> Optional[float]:
        """Pixel AUROC; None without good or without anomalous pixels."""
        if not self._good.any() or not self._anomalous.any():
            return None
        return area_under_roc(self._good, self._anomalous)

    def aupro(self, limit: float = 0.3) -> Optional[float]:
        """Area under the per-region overlap curve up to the false-positive rate ``limit``, divided by ``limit``.

        The overlap is the share of an anomalous region above the threshold, averaged over all regions (8-connected);
        the false-positive rate is the share of all good pixels. None without good pixels or regions. Bergmann et al.,
        "The MVTec Anomaly Detection Dataset", IJCV 129, 2021.
        """
        if not self._good.any() or not self._regions:
            return None
        rate = counts_above(self._good) / self._good.sum()
        overlap = counts_above(self._overlap) / (_REGION * self._regions)
        inside = rate <= limit
        at_limit = np.interp(limit, rate, overlap)
        return area_under(np.append(rate[inside], limit), np.append(overlap[inside], at_limit)) / limit


def _unpacked(bins: str) -> np.ndarray:
    """The four lists of ``PixelMetrics.to_json``, int64 [4, bins]."""
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(base64.b64decode(bins, validate=True), _UNPACKED)
    if not decompressor.eof:
        raise ValueError("the bins are cut short, or too many")
    lists = np.array(json.loads(text))
    if lists.ndim != 2 or len(lists) != 4 or (lists.size and lists.dtype.kind != "i") or (lists < 0).any():
        raise ValueError("not four lists of counts")
    return lists.astype(np.int64)
