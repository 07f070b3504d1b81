"""The images that two models see most differently, and those that the last one is most wrong about, small."""

import base64
import io
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image

from uadtool.comparing.comparison import Model, changed
from uadtool.comparing.results import Result, ScoredImage
from uadtool.data.images import fitted, image_size, read_image
from uadtool.errors import UadtoolError

GROUP = 6
"""Images of each kind."""

SIDE = 160
"""Pixels of the longer side of a thumbnail."""


class Shown(NamedTuple):
    """An image worth a look: what happened to it in words, and by model label what it scores and its threshold."""

    path: str
    class_name: Optional[str]
    label: Optional[str]
    finding: str
    scores: Tuple[Tuple[str, float, float], ...]


class Group(NamedTuple):
    """Up to ``GROUP`` images of ``total``."""

    title: str
    images: List[Shown]
    total: int


def disagreements(models: Sequence[Model]) -> List[Group]:
    """What changed sides between the first model and others, and what the last one misses and alarms falsely about.

    The farthest come first: those that moved farthest, and those farthest from the threshold.
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
        wrong = sorted((abs(image.score - result.threshold), path) for path, image in result.images.items()
                       if image.label == label and image.anomalous == anomalous)[::-1]
        groups.append(Group(title, [_shown(path, finding, scored) for _, path in wrong[:GROUP]], len(wrong)))
    return groups


def _moved(models: Sequence[Model]) -> List[Shown]:
    words = {(True, "anomalous"): "now found", (False, "anomalous"): "now missed", (True, "good"): "new false alarm",
             (False, "good"): "no false alarm any more", (True, None): "now anomalous", (False, None): "now good"}
    try:
        records = changed(models)
    except UadtoolError:  # of different images; the table has told already
        return []
    shown: Dict[str, Shown] = {}  # an image once, where it moved farthest, with all models that it moved for
    for record in records:
        first, other = zip(record["models"], record["scores"], record["thresholds"])
        if record["path"] in shown:
            image = shown[record["path"]]
            shown[record["path"]] = image._replace(scores=(*image.scores, other))
        else:
            shown[record["path"]] = Shown(record["path"], record.get("class"), record.get("label"),
                                          words[other[1] > other[2], record.get("label")], (first, other))
    return list(shown.values())


def _shown(path: str, finding: str, scored: Sequence[Tuple[str, Result]]) -> Shown:
    image: ScoredImage = scored[-1][1].images[path]
    both = [scored[0], scored[-1]] if len(scored) > 1 else [scored[-1]]
    return Shown(path, image.class_name, image.label, finding, tuple(
        (label, result.images[path].score, result.threshold) for label, result in both if path in result.images))


def thumbnail(path: str) -> Optional[str]:
    """A JPEG of at most ``SIDE`` x ``SIDE`` pixels as a data URI, or None when the image cannot be read any more."""
    try:
        size = image_size(path)
        pixels = read_image(path, fitted(size, min(SIDE, max(size))))
    except (UadtoolError, ValueError):  # ValueError: a path with a null byte
        return None
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def thumbnails(groups: Iterable[Group]) -> Dict[str, Optional[str]]:
    """The thumbnail of each path in ``groups``."""
    return {path: thumbnail(path) for path in {image.path: None for group in groups for image in group.images}}
