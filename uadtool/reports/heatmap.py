"""Pictures of where a detector saw something: the image, and beside it the image under its anomaly map."""

import heapq
import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from uadtool.artifacts import atomic_write
from uadtool.errors import UadtoolError
from uadtool.images import fitted, image_size, read_image
from uadtool.reports.files import OutputFolder
from uadtool.scoring import upsample
from uadtool.terminal import printable

LONGEST_SIDE = (400, 4096)
"""Bounds in pixels of each of the two panels, which otherwise have the image's own size: small images grow so that the
contour and the caption can be read, and none takes more memory than there is."""

TILE = 240
"""Pixels of an image on the contact sheet."""

INFERNO = ("000004", "160b39", "420a68", "6a176e", "932667", "bc3754", "dd513a", "f37819", "fca50a", "f6d746", "fcffa4")
"""Equally spaced colours of matplotlib's inferno (CC0): readable with any colour vision, and in grey."""

OPACITY = 0.85
BACKGROUND, TEXT, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
MARGIN = 12
CAPTION_WIDTH = 540
SCALE_BAR = (160, 14)


class Heatmaps:
    """Draws pictures into ``directory``, one PNG per image.

    The colours of every picture of a run go from 0 to twice the threshold, at least to 1, so that pictures can be
    compared.
    """

    def __init__(self, directory: str) -> None:
        self._folder = OutputFolder(directory)

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Dict[str, str]:
        """Write the picture for an ``image`` record and its map, float32 [h, w]; returns the record's ``heatmap``."""
        picture = render(record, anomaly_map, threshold)
        path = self._folder.path(record["path"], ".png")
        with atomic_write(path, durable=False) as temporary:
            picture.save(temporary, format="PNG", compress_level=1)  # 5 times as fast as the default, 15 % larger
        return {"heatmap": str(path)}


class ContactSheet:
    """One picture of the most suspicious images of a run, the highest score first, each under its anomaly map."""

    def __init__(self, path: str, count: int) -> None:
        self._path, self._place, self._count = path, Path(path).resolve(), count
        self._highest: List[Tuple[float, int, Image.Image]] = []
        self._order = itertools.count()

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Dict[str, str]:
        """Take note of an ``image`` record and its map, float32 [h, w]; adds nothing to the record.

        Raises:
            UadtoolError: the image would be lost, for the picture has its name.
        """
        if Path(record["path"]).resolve() == self._place:
            raise UadtoolError(f"{self._path} is scored, too, and would be lost; give the contact sheet another name")
        place = record["score"], -next(self._order)
        if len(self._highest) < self._count or place > self._highest[0][:2]:
            tile = _tile(record, anomaly_map, threshold)
            (heapq.heappush if len(self._highest) < self._count else heapq.heapreplace)(self._highest, (*place, tile))
        return {}

    def save(self) -> None:
        """Draw the picture; without any image there is none."""
        tiles = [tile for *_, tile in sorted(self._highest, key=lambda found: found[:2], reverse=True)]
        if not tiles:
            return
        columns = min(len(tiles), max(2, round((2 * len(tiles)) ** 0.5)))
        rows = -(-len(tiles) // columns)
        width, height = tiles[0].size
        sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), BACKGROUND)
        for place, tile in enumerate(tiles):
            row, column = divmod(place, columns)
            sheet.paste(tile, (MARGIN + column * (width + MARGIN), MARGIN + row * (height + MARGIN)))
        with atomic_write(self._path) as temporary:
            sheet.save(temporary, format="PNG")


def _tile(record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Image.Image:
    """An image of the contact sheet, with its caption."""
    tile = Image.new("RGB", (TILE, TILE + 44), BACKGROUND)
    size = fitted(image_size(record["path"]), TILE)
    overlay = _overlay(read_image(record["path"], size), upsample(anomaly_map, size), threshold)
    tile.paste(Image.fromarray(overlay), ((TILE - size[1]) // 2, (TILE - size[0]) // 2))
    draw = ImageDraw.Draw(tile)
    verdict = "anomalous" if record["anomalous"] else "good"
    _text(draw, (0, TILE + 4), f"{record['score']:.2f}  {verdict}, {record['nearest_class']}", TEXT)
    name = "/".join(Path(record["path"]).parts[-2:])
    while draw.textlength(_latin(name), _font()) > TILE:
        name = f"...{name[4:]}"
    _text(draw, (0, TILE + 23), name, FAINT)
    return tile


def render(record: Dict[str, Any], anomaly_map: np.ndarray, threshold: float) -> Image.Image:
    """The image, the image under its map with a contour around what lies above the threshold, and a caption.

    The panels stand side by side, or one below the other when the image is wide.
    """
    height, width = _panel_size(record["path"])
    image = read_image(record["path"], (height, width))
    overlay = _overlay(image, upsample(anomaly_map, (height, width)), threshold)
    beside = width < 1.5 * height
    second = (width + MARGIN, 0) if beside else (0, height + MARGIN)
    caption = _caption(record, threshold, max(second[0] + width, CAPTION_WIDTH))
    picture = Image.new("RGB", (caption.width, second[1] + height + caption.height), BACKGROUND)
    left = (caption.width - second[0] - width) // 2
    picture.paste(Image.fromarray(image), (left, 0))
    picture.paste(Image.fromarray(overlay), (left + second[0], second[1]))
    picture.paste(caption, (0, second[1] + height))
    return picture


def _panel_size(path: str) -> Tuple[int, int]:
    size = image_size(path)
    return fitted(size, min(max(max(size), LONGEST_SIDE[0]), LONGEST_SIDE[1]))


def _overlay(image: np.ndarray, values: np.ndarray, threshold: float) -> np.ndarray:
    """``image`` uint8 [H, W, 3], in grey, under the map ``values`` [H, W]: the stranger a place, the more colour."""
    share = np.clip(values / _top(threshold), 0, 1)[..., None]
    opacity = OPACITY * share * (2 - share)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    blended = np.asarray((1 - opacity) * grey + opacity * _colours(share[..., 0]))
    above = Image.fromarray(np.uint8(255) * (values > threshold))
    outside = np.asarray(above.filter(ImageFilter.MaxFilter(5))) > np.asarray(above)
    inside = np.asarray(above.filter(ImageFilter.MinFilter(5))) < np.asarray(above)
    blended[outside], blended[inside] = 0, 255  # a line that stands out on bright and on dark
    return blended.astype(np.uint8)


def _caption(record: Dict[str, Any], threshold: float, width: int) -> Image.Image:
    verdict = "anomalous" if record["anomalous"] else "good"
    caption = Image.new("RGB", (width, 64), BACKGROUND)
    draw = ImageDraw.Draw(caption)
    _text(draw, (MARGIN, 10), f"{verdict}: score {record['score']:.2f}, threshold {threshold:.2f}", TEXT)
    _text(draw, (MARGIN, 34), f"nearest class: {record['nearest_class']}", FAINT)
    left, top = width - SCALE_BAR[0] - 3 * MARGIN, 14
    colours = _colours(np.tile(np.linspace(0, 1, SCALE_BAR[0]), (SCALE_BAR[1], 1)))
    caption.paste(Image.fromarray(colours), (left, top))
    for value in (0, threshold, _top(threshold)):
        x = left + round(np.clip(value / _top(threshold), 0, 1) * (SCALE_BAR[0] - 1))
        draw.line([(x, top), (x, top + SCALE_BAR[1] + 4)], fill=TEXT)
        text = f"{value:.3g}"
        _text(draw, (x - draw.textlength(text, _font()) / 2, top + SCALE_BAR[1] + 6), text, FAINT)
    return caption


def _text(draw: ImageDraw.ImageDraw, position: Tuple[float, float], text: str, colour: Tuple[int, int, int]) -> None:
    draw.text(position, _latin(text), fill=colour, font=_font())


def _latin(text: str) -> str:
    """The font has no other letters, and no lines."""
    return printable(text).encode("latin-1", "replace").decode("latin-1")


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(15)


def _colours(share: np.ndarray) -> np.ndarray:
    """Colours, uint8 [..., 3], of shares of the scale (0 to 1)."""
    return _scale()[(share * 255).round().astype(np.uint8)]


@lru_cache(maxsize=1)
def _scale() -> np.ndarray:
    """The colours of the scale, uint8 [256, 3]."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in INFERNO])
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(np.linspace(0, 1, 256), places, channel).round() for channel in anchors.T],
                    axis=-1).astype(np.uint8)


def _top(threshold: float) -> float:
    """The score at the upper end of the scale; a threshold that is not positive has no double to end at."""
    return max(2 * threshold, 1.0)
