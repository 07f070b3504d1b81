"""Pictures of what a detector found: the image, and beside it the image under its anomaly map."""

from typing import Any, Dict, NamedTuple, Tuple

import numpy as np
from PIL import Image, ImageDraw

from uadtool.data.images import ImageError, fitted, image_size, read_image
from uadtool.files import atomic_write
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.drawing import BACKGROUND, FAINT, MARGIN, TEXT, colours, draw_text, font, overlay_map, scale_top
from uadtool.scoring.image_files import OutputFolder

LONGEST_SIDE = (400, 4096)
"""Bounds in pixels of each of the two panels, which otherwise have the size of the image. Small images are enlarged to
keep contour and caption readable; the upper bound limits the memory."""
CAPTION_WIDTH, CAPTION_HEIGHT = 540, 64
SCALE_BAR = (160, 14)


class Heatmaps(OutputFolder):
    """Draws a PNG for each image into ``directory``.

    The colours range from 0 to twice the image's threshold (at least 1), so that the pictures of a run can be compared.
    """

    def add(self, record: Dict[str, Any], anomaly_map: np.ndarray) -> Dict[str, str]:
        """Write the picture for an ``image`` record and its map, float32 [h, w]; returns the record's ``heatmap``."""
        picture = render(record, anomaly_map)
        path = self.path(record["path"], ".png")
        with atomic_write(path, durable=False) as temporary:
            picture.save(temporary, format="PNG", compress_level=1)  # 5 times as fast as the default, 15 % larger
        return {"heatmap": str(path)}


def render(record: Dict[str, Any], anomaly_map: np.ndarray) -> Image.Image:
    """The image, the image under its map with a contour around values above the threshold, and a caption.

    The panels stand side by side, or one below the other if the image is wide.
    """
    layout = _Layout.of(image_size(record["path"]))
    image = read_image(record["path"], layout.panel)
    overlay = overlay_map(image, upsample(anomaly_map, layout.panel), record["threshold"])
    height, width = layout.size
    picture = Image.new("RGB", (width, height), BACKGROUND)
    picture.paste(Image.fromarray(image), (layout.image_left, 0))
    picture.paste(Image.fromarray(overlay), layout.overlay)
    picture.paste(_caption(record, width), (0, height - CAPTION_HEIGHT))
    return picture


def read_overlay(picture: str, image: str) -> np.ndarray:
    """The image under its map, uint8 [H, W, 3], from the picture that ``Heatmaps`` wrote for ``image``.

    Raises:
        ImageError: one of the files cannot be read, or the picture does not have the size of that image's picture.
    """
    layout = _Layout.of(image_size(image))
    if image_size(picture) != layout.size:
        raise ImageError(f"{picture} is not the heatmap of {image}")
    (height, width), (left, top) = layout.panel, layout.overlay
    return read_image(picture, layout.size)[top:top + height, left:left + width]


class _Layout(NamedTuple):
    """Where the parts of a picture are, in pixels.

    ``size`` is that of the picture, ``panel`` that of each of the two panels, both (height, width). ``image_left`` is
    the left edge of the first panel, ``overlay`` the (left, top) of the second.
    """

    size: Tuple[int, int]
    panel: Tuple[int, int]
    image_left: int
    overlay: Tuple[int, int]

    @classmethod
    def of(cls, size: Tuple[int, int]) -> "_Layout":
        """The layout for an image of ``size`` (height, width)."""
        height, width = fitted(size, min(max(max(size), LONGEST_SIDE[0]), LONGEST_SIDE[1]))
        right, down = (width + MARGIN, 0) if width < 1.5 * height else (0, height + MARGIN)
        total = max(right + width, CAPTION_WIDTH)
        left = (total - right - width) // 2
        return cls((down + height + CAPTION_HEIGHT, total), (height, width), left, (left + right, down))


def _caption(record: Dict[str, Any], width: int) -> Image.Image:
    verdict, threshold = "anomalous" if record["anomalous"] else "good", record["threshold"]
    caption = Image.new("RGB", (width, CAPTION_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(caption)
    draw_text(draw, (MARGIN, 10), f"{verdict}: score {record['score']:.2f}, threshold {threshold:.2f}", TEXT)
    draw_text(draw, (MARGIN, 34), f"nearest class: {record['nearest_class']}", FAINT)
    left, top = width - SCALE_BAR[0] - 3 * MARGIN, 14
    scale = colours(np.tile(np.linspace(0, 1, SCALE_BAR[0]), (SCALE_BAR[1], 1)))
    caption.paste(Image.fromarray(scale), (left, top))
    for value in (0, threshold, scale_top(threshold)):
        x = left + round(np.clip(value / scale_top(threshold), 0, 1) * (SCALE_BAR[0] - 1))
        draw.line([(x, top), (x, top + SCALE_BAR[1] + 4)], fill=TEXT)
        text = f"{value:.3g}"
        draw_text(draw, (x - draw.textlength(text, font()) / 2, top + SCALE_BAR[1] + 6), text, FAINT)
    return caption
