"""Thumbnails of the images about which models disagree most, and which the last model gets most wrong.

Beside them stand thumbnails of their anomaly maps, if the models were scored with ``--heatmaps``.
"""

import base64
import io
from functools import lru_cache
from pathlib import PurePath
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image, ImageDraw

from uadtool.comparing.comparison import Model, changed
from uadtool.comparing.results import Result
from uadtool.data.images import fitted, image_size, read_image
from uadtool.errors import UadtoolError
from uadtool.scoring.heatmaps import read_overlay

GROUP = 6
"""Images of a group at most."""

SIDE = 160
"""Longer side of a thumbnail, in pixels."""

MOST_BOXES = 20
"""Regions framed in a thumbnail at most: those with the highest peaks."""


class Shown(NamedTuple):
    """An image worth a look: the finding in words, and a model label, a score and a threshold for each model.

    ``heatmaps`` holds the label of each model whose anomaly map is of interest, and the path of its picture if known.
    ``boxes`` are the regions that one of these models found, the first that found any.
    """

    path: str
    class_name: Optional[str]
    label: Optional[str]
    finding: str
    scores: Tuple[Tuple[str, float, float], ...]
    heatmaps: Tuple[Tuple[str, Optional[str]], ...]
    boxes: Tuple[Tuple[int, ...], ...]

    @property
    def kind(self) -> str:
        """The label as the page calls it."""
        return {"good": "good", "anomalous": "defective"}.get(self.label or "", "unlabelled")

    @property
    def name(self) -> str:
        """The end of the path."""
        return "/".join(PurePath(self.path).parts[-3:])

    @property
    def description(self) -> str:
        """The alternative text of the thumbnail, without its frames."""
        return f"{self.kind} image{f' of {self.class_name}' if self.class_name else ''}, {self.name}"


class Group(NamedTuple):
    """Up to ``GROUP`` images of ``total``."""

    title: str
    images: List[Shown]
    total: int


def disagreements(models: Sequence[Model]) -> List[Group]:
    """Images that changed sides between the first model and others; misses and false alarms of the last model.

    Those that moved farthest, or lie farthest from the threshold, come first.
    """
    scored = [(model.label, model.scores) for model in models if model.scores]
    if not scored:
        return []
    groups = []
    if len(scored) > 1:
        moved = _moved(models)
        groups.append(Group("Changed sides of the threshold", moved[:GROUP], len(moved)))
    last, result = scored[-1]
    for title, finding, label, anomalous in (
            (f"Defects that {last} misses", "missed", "anomalous", False),
            (f"False alarms of {last}", "false alarm", "good", True)):
        wrong = sorted((abs(image.margin), path) for path, image in result.images.items()
                       if image.label == label and image.anomalous == anomalous)[::-1]
        groups.append(Group(title, [_shown(path, finding, scored) for _, path in wrong[:GROUP]], len(wrong)))
    return groups


def _moved(models: Sequence[Model]) -> List[Shown]:
    """The images that changed sides, each once: where it moved farthest, with all models for which it moved."""
    findings = {(True, "anomalous"): "now found", (False, "anomalous"): "now missed", (True, "good"): "new false alarm",
                (False, "good"): "no longer a false alarm", (True, None): "now anomalous", (False, None): "now good"}
    try:
        records = changed(models)
    except UadtoolError:  # the models scored different images, and the comparison has warned about it
        return []
    scored = [(model.label, model.scores) for model in models if model.scores]
    shown: Dict[str, Shown] = {}
    for record in records:
        path, label = record["path"], record.get("label")
        first, other = zip(record["models"], record["scores"], record["thresholds"])
        if path in shown:
            shown[path] = shown[path]._replace(scores=(*shown[path].scores, other))
        else:
            shown[path] = Shown(path, record.get("class"), label, findings[other[1] > other[2], label], (first, other),
                                _heatmaps(path, record["models"], scored), _boxes(path, record["models"], scored))
    return list(shown.values())


def _shown(path: str, finding: str, scored: Sequence[Tuple[str, Result]]) -> Shown:
    image = scored[-1][1].images[path]
    first_and_last = [scored[0], scored[-1]] if len(scored) > 1 else scored
    return Shown(path, image.class_name, image.label, finding, tuple(
        (label, result.images[path].score, result.images[path].threshold) for label, result in first_and_last
        if path in result.images), _heatmaps(path, [scored[-1][0]], scored), image.boxes)


def _heatmaps(path: str, labels: Sequence[str], scored: Sequence[Tuple[str, Result]]
              ) -> Tuple[Tuple[str, Optional[str]], ...]:
    """``Shown.heatmaps`` of an image for the models with these labels.

    A file that two models name is left out, because the run that came first no longer has its picture there.
    """
    files = {label: result.images[path].heatmap for label, result in scored if path in result.images}
    named = list(files.values())
    return tuple((label, files[label] if named.count(files[label]) == 1 else None) for label in labels)


def _boxes(path: str, labels: Sequence[str], scored: Sequence[Tuple[str, Result]]) -> Tuple[Tuple[int, ...], ...]:
    """``Shown.boxes`` of an image for the models with these labels."""
    found = (result.images[path].boxes for label, result in scored if label in labels and path in result.images)
    return next(filter(None, found), ())


def thumbnail(path: str, boxes: Sequence[Tuple[int, ...]] = ()) -> Optional[str]:
    """A JPEG of at most ``SIDE`` x ``SIDE`` pixels as a data URI; None if the image can no longer be read.

    Args:
        boxes: parts of the image to frame: left, top, width, height.
    """
    try:
        size = image_size(path)
        picture = Image.fromarray(read_image(path, fitted(size, min(SIDE, max(size)))))
    except (UadtoolError, ValueError):  # ValueError: a path with a null byte
        return None
    draw = ImageDraw.Draw(picture)
    for left, top, width, height in boxes[:MOST_BOXES][::-1]:
        # The least of integers first: a file may claim a box that no image has.
        places = [min(place, side) * shown // side for place, side, shown in (
            (left, size[1], picture.width), (top, size[0], picture.height),
            (left + width, size[1], picture.width), (top + height, size[0], picture.height))]
        for margin, colour in ((1, "black"), (0, "white")):  # visible on bright and on dark images
            draw.rectangle((places[0] - margin, places[1] - margin, places[2] + margin, places[3] + margin),
                           outline=colour)
    return _jpeg(picture)


def map_thumbnails(images: Iterable[Shown]) -> Dict[Shown, List[Tuple[str, str]]]:
    """For each image the anomaly maps that can be read: the label of the model, and a JPEG as a data URI."""
    read = lru_cache(maxsize=None)(_map_thumbnail)  # an image may be in two groups
    found = {image: [(label, read(image.path, heatmap)) for label, heatmap in image.heatmaps if heatmap]
             for image in images}
    return {image: [(label, uri) for label, uri in maps if uri] for image, maps in found.items()}


def _map_thumbnail(path: str, heatmap: str) -> Optional[str]:
    try:
        overlay = Image.fromarray(read_overlay(heatmap, path))
    except (UadtoolError, ValueError):  # as above
        return None
    return _jpeg(overlay.resize(fitted(overlay.size, SIDE), Image.Resampling.BILINEAR))


def _jpeg(image: Image.Image) -> str:
    """The image as a data URI."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
