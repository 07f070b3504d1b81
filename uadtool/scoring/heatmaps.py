"""Pictures of what a detector found: the image, and beside it the image under its anomaly map."""

from typing import Any, Dict

import numpy as np
from PIL import Image, ImageDraw

from uadtool.data.images import fitted, image_size, read_image, upsample
from uadtool.files import atomic_write
from uadtool.scoring.drawing import BACKGROUND, FAINT, MARGIN, TEXT, colours, draw_text, font, overlay_map, scale_top
from uadtool.scoring.image_files import OutputFolder

LONGEST_SIDE = (400, 4096)
"""Bounds in pixels of each of the two panels, which otherwise have the size of the image. Small images are enlarged to
keep contour and caption readable; the upper bound limits the memory."""
CAPTION_WIDTH = 540
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
    size = image_size(record["path"])
    height, width = fitted(size, min(max(max(size), LONGEST_SIDE[0]), LONGEST_SIDE[1]))
    image = read_image(record["path"], (height, width))
    overlay = overlay_map(image, upsample(anomaly_map, (height, width)), record["threshold"])
    beside = width < 1.5 * height
    second = (width + MARGIN, 0) if beside else (0, height + MARGIN)
    caption = _caption(record, max(second[0] + width, CAPTION_WIDTH))
    picture = Image.new("RGB", (caption.width, second[1] + height + caption.height), BACKGROUND)
    left = (caption.width - second[0] - width) // 2
    picture.paste(Image.fromarray(image), (left, 0))
    picture.paste(Image.fromarray(overlay), (left + second[0], second[1]))
    picture.paste(caption, (0, second[1] + height))
    return picture


def _caption(record: Dict[str, Any], width: int) -> Image.Image:
    verdict, threshold = "anomalous" if record["anomalous"] else "good", record["threshold"]
    caption = Image.new("RGB", (width, 64), BACKGROUND)
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
