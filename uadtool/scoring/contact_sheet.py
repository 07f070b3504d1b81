"""One picture of the most suspicious images of a run."""

import heapq
import itertools
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from PIL import Image, ImageDraw

from uadtool.data.images import fitted, image_size, read_image
from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.drawing import BACKGROUND, FAINT, MARGIN, TEXT, draw_text, font, latin, overlay_map

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats of the picture, by suffix."""

TILE = 240
"""Pixels of an image on the contact sheet."""


class ContactSheet:
    """Draws the ``count`` images with the highest scores, the highest first, each under its anomaly map."""

    def __init__(self, path: str, count: int) -> None:
        self._path, self._resolved, self._count = path, Path(path).resolve(), count
        self._highest: List[Tuple[float, int, Image.Image]] = []
        self._order = itertools.count()

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray) -> Dict[str, str]:
        """Consider an ``image`` record and its map, float32 [h, w]; adds nothing to the record.

        Raises:
            UadtoolError: the picture would overwrite the image.
        """
        if Path(record["path"]).resolve() == self._resolved:
            raise UadtoolError(f"the contact sheet would overwrite the image {self._path}; choose another name")
        rank = record["score"], -next(self._order)
        if len(self._highest) < self._count:
            heapq.heappush(self._highest, (*rank, _tile(record, anomaly_map)))
        elif rank > self._highest[0][:2]:
            heapq.heapreplace(self._highest, (*rank, _tile(record, anomaly_map)))
        return {}

    def save(self) -> None:
        """Draw the picture, unless no image was scored."""
        tiles = [tile for *_, tile in sorted(self._highest, key=lambda entry: entry[:2], reverse=True)]
        if not tiles:
            return
        columns = min(len(tiles), max(2, round((2 * len(tiles)) ** 0.5)))
        rows = -(-len(tiles) // columns)
        width, height = tiles[0].size
        sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), BACKGROUND)
        for index, tile in enumerate(tiles):
            row, column = divmod(index, columns)
            sheet.paste(tile, (MARGIN + column * (width + MARGIN), MARGIN + row * (height + MARGIN)))
        with atomic_write(self._path) as temporary:
            sheet.save(temporary, format=FORMATS[Path(self._path).suffix.lower()])


def _tile(record: Dict[str, Any], anomaly_map: np.ndarray) -> Image.Image:
    """An image of the contact sheet with its caption."""
    tile = Image.new("RGB", (TILE, TILE + 44), BACKGROUND)
    size = fitted(image_size(record["path"]), TILE)
    overlay = overlay_map(read_image(record["path"], size), upsample(anomaly_map, size), record["threshold"])
    tile.paste(Image.fromarray(overlay), ((TILE - size[1]) // 2, (TILE - size[0]) // 2))
    draw = ImageDraw.Draw(tile)
    verdict = "anomalous" if record["anomalous"] else "good"
    draw_text(draw, (0, TILE + 4), f"{record['score']:.2f}  {verdict}, {record['nearest_class']}", TEXT)
    name = "/".join(Path(record["path"]).parts[-2:])
    while draw.textlength(latin(name), font()) > TILE:
        name = f"...{name[4:]}"
    draw_text(draw, (0, TILE + 23), name, FAINT)
    return tile
