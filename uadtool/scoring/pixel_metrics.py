"""Pixel AUROC and AUPRO of a stream of anomaly maps."""

import base64
import json
import zlib
from typing import Any, Dict, Optional

import numpy as np

from uadtool.scoring.metrics import counts_above, roc_area, trapezoid_area

_UNPACKED = 8 << 20  # bytes of pixel counts at most: 65,536 bins have less


class PixelMetrics:
    """Pixel AUROC and AUPRO of a stream of anomaly maps, in about 1.5 MB whatever the number of images.

    Pixels are counted in a fixed grid of 65,536 bins: the upper half of float32 in its numeric order. A bin is at most
    1/128 of its value wide, so no range has to be known beforehand. The grid is finest around zero, where the scores of
    good images lie: figures are within 0.0005 of the exact ones there, and useless for a map whose whole spread is less
    than 1/128 of its offset.
    """

    _BINS = 1 << 16
    _REGION = 1 << 40  # what a region weighs: in integers, so that no order of images changes a sum

    def __init__(self) -> None:
        self._good = np.zeros(self._BINS, np.int64)
        self._anomalous = np.zeros(self._BINS, np.int64)
        self._overlap = np.zeros(self._BINS, np.int64)  # each pixel of a region weighs 1 / area of the region
        self._regions = 0

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Add one image: float32 [H, W] and its ground truth, bool [H, W] (all False for a good image).

        Raises:
            ValueError: the shapes differ or the map holds a NaN.
        """
        if anomaly_map.shape != mask.shape:
            raise ValueError(f"the anomaly map is {anomaly_map.shape}, its mask {mask.shape}")
        if np.isnan(anomaly_map).any():
            raise ValueError("the anomaly map holds values that are not numbers")
        bins = self._bins(anomaly_map)
        self._good += np.bincount(bins[~mask], minlength=self._BINS)
        if not mask.any():
            return
        from scipy.ndimage import label

        regions, count = label(mask, structure=np.ones((3, 3)))
        regions, bins = regions[mask], bins[mask]
        weights = np.rint(self._REGION / np.bincount(regions)[regions])
        self._anomalous += np.bincount(bins, minlength=self._BINS)
        self._overlap += np.bincount(bins, weights, minlength=self._BINS).astype(np.int64)
        self._regions += count

    def merge(self, other: "PixelMetrics") -> None:
        """Add the images that ``other`` has seen."""
        self._good += other._good
        self._anomalous += other._anomalous
        self._overlap += other._overlap
        self._regions += other._regions

    def to_json(self) -> Dict[str, Any]:
        """All that was counted, to be merged elsewhere: usually 5 to 35 KB of text, whatever the number of images.

        ``regions`` is their number. ``bins`` is the base64 of the zlib-compressed JSON text of four lists about the
        bins that are not empty, ascending: distance to the bin before, good pixels, anomalous ones, their overlap.
        """
        filled = np.flatnonzero(self._good + self._anomalous)
        lists = [np.diff(filled, prepend=0), self._good[filled], self._anomalous[filled], self._overlap[filled]]
        text = json.dumps([values.tolist() for values in lists], separators=(",", ":"))
        return {"regions": self._regions, "bins": base64.b64encode(zlib.compress(text.encode(), 9)).decode()}

    @classmethod
    def from_json(cls, counted: Dict[str, Any]) -> "PixelMetrics":
        """The opposite of ``to_json``.

        Raises:
            ValueError: that did not write it.
        """
        found = cls()
        try:
            unpacking = zlib.decompressobj()
            text = unpacking.decompress(base64.b64decode(counted["bins"], validate=True), _UNPACKED)
            if not unpacking.eof:
                raise ValueError("the bins are cut short, or too many")
            lists = np.array(json.loads(text))
            if lists.ndim != 2 or len(lists) != 4 or (lists.size and lists.dtype.kind != "i") or (lists < 0).any():
                raise ValueError("not four lists of counts")
            distances, *counts = lists.astype(np.int64)
            filled = np.cumsum(distances)
            if not distances[1:].all():
                raise ValueError("a bin is there twice")
            if max((values.sum(dtype=float) for values in counts[:2]), default=0) >= 2 ** 53:
                raise ValueError("there are more pixels than can be")
            regions, anomalous = counted["regions"], int(counts[1].sum())
            if type(regions) is not int or not 0 <= regions <= anomalous:
                raise ValueError(f"{regions!r:.40} is no number of regions in {anomalous} anomalous pixels")
            # each pixel's weight was rounded; the float sum keeps the exact one from running over
            if counts[2].sum(dtype=float) >= 2 ** 62 or int(counts[2].sum()) > cls._REGION * regions + anomalous:
                raise ValueError(f"the overlap is more than {regions} regions have")
            found._good[filled], found._anomalous[filled], found._overlap[filled] = counts
            found._regions = regions
        except (IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"its pixel counts cannot be read: {error}") from error
        return found

    def auroc(self) -> Optional[float]:
        """Pixel AUROC, or None without good or without anomalous pixels."""
        if not self._good.any() or not self._anomalous.any():
            return None
        return roc_area(self._good, self._anomalous)

    def aupro(self, limit: float = 0.3) -> Optional[float]:
        """Area under the per-region overlap curve up to the false-positive rate ``limit``, divided by ``limit``.

        The overlap is the share of an anomalous region above the threshold, averaged over all regions (8-connected);
        the false-positive rate is the share of all good pixels. None without good pixels or regions. Bergmann et al.,
        "The MVTec Anomaly Detection Dataset", IJCV 129, 2021.
        """
        if not self._good.any() or not self._regions:
            return None
        rate = counts_above(self._good) / self._good.sum()
        overlap = counts_above(self._overlap) / (self._REGION * self._regions)
        inside = rate <= limit
        at_limit = np.interp(limit, rate, overlap)
        return trapezoid_area(np.append(rate[inside], limit), np.append(overlap[inside], at_limit)) / limit

    @staticmethod
    def _bins(values: np.ndarray) -> np.ndarray:
        # Read as a signed integer, float32 is in order once all but the sign of negative numbers is inverted. Adding
        # zero makes -0.0 equal to 0.0.
        bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
        ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
        return np.asarray((ordered >> 16).astype(np.intp) + (PixelMetrics._BINS >> 1))
