"""Tools to draw pictures: an image under its anomaly map, the colours of the scale, and text."""

import unicodedata
from functools import lru_cache
from typing import Any, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from uadtool.scoring.anomaly_maps import inside_roi
from uadtool.terminal import printable

INFERNO = ("000004", "160b39", "420a68", "6a176e", "932667", "bc3754", "dd513a", "f37819", "fca50a", "f6d746", "fcffa4")
"""Equally spaced colours of matplotlib's inferno (CC0): readable with any colour vision, and in grey."""

OPACITY, DARK = 0.85, 0.35
BACKGROUND, TEXT, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
MARGIN = 12


def overlay_map(image: np.ndarray, values: np.ndarray, threshold: float) -> np.ndarray:
    """``image``, uint8 [H, W, 3], in grey under the map ``values`` [H, W]. Colour grows with the anomaly score.

    Outside the region of interest the image is dark.
    """
    share = np.clip(values / scale_top(threshold), 0, 1)[..., None]
    opacity = OPACITY * share * (2 - share)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    blended = np.asarray((1 - opacity) * grey + opacity * colours(share[..., 0]))
    blended[~inside_roi(values)] *= DARK
    above = Image.fromarray(np.uint8(255) * (values > threshold))
    outside = np.asarray(above.filter(ImageFilter.MaxFilter(5))) > np.asarray(above)
    inside = np.asarray(above.filter(ImageFilter.MinFilter(5))) < np.asarray(above)
    blended[outside], blended[inside] = 0, 255  # a line that is visible on bright and on dark images
    return blended.astype(np.uint8)


def draw_text(draw: ImageDraw.ImageDraw, position: Tuple[float, float], text: str,
              colour: Tuple[int, int, int]) -> None:
    draw.text(position, latin(text), fill=colour, font=font())


def latin(text: str) -> str:
    """The text in the characters of the font, which lacks all others, line breaks, and accents on their own."""
    return printable(unicodedata.normalize("NFC", text)).encode("latin-1", "replace").decode("latin-1")


@lru_cache(maxsize=1)
def font() -> Any:
    return ImageFont.load_default(15)


def colours(share: np.ndarray) -> np.ndarray:
    """Colours, uint8 [..., 3], of shares of the scale (0 to 1)."""
    return _scale()[(share * 255).round().astype(np.uint8)]


@lru_cache(maxsize=1)
def _scale() -> np.ndarray:
    """The colours of the scale, uint8 [256, 3]."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in INFERNO])
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(np.linspace(0, 1, 256), places, channel).round() for channel in anchors.T],
                    axis=-1).astype(np.uint8)


def scale_top(threshold: float) -> float:
    """The score at the upper end of the scale: twice the threshold, which may be negative, but at least 1."""
    return max(2 * threshold, 1.0)
