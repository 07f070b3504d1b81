"""Thumbnails of the images about which models disagree most, and which the last model gets most wrong."""

import base64
import io
from pathlib import PurePath
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from PIL import Image

from uadtool.comparing.comparison import Model, changed
from uadtool.comparing.results import Result
from uadtool.data.images import fitted, image_size, read_image
from uadtool.errors import UadtoolError

GROUP = 6
"""Images of a group at most."""

SIDE = 160
"""Longer side of a thumbnail, in pixels."""


class Shown(NamedTuple):
    """An image worth a look: the finding in words, and a model label, a score and a threshold for each model."""

    path: str
    class_name: Optional[str]
    label: Optional[str]
    finding: str
    scores: Tuple[Tuple[str, float, float], ...]

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
        """The alternative text of the thumbnail."""
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
    shown: Dict[str, Shown] = {}
    for record in records:
        path, label = record["path"], record.get("label")
        first, other = zip(record["models"], record["scores"], record["thresholds"])
        if path in shown:
            shown[path] = shown[path]._replace(scores=(*shown[path].scores, other))
        else:
            shown[path] = Shown(path, record.get("class"), label, findings[other[1] > other[2], label], (first, other))
    return list(shown.values())


def _shown(path: str, finding: str, scored: Sequence[Tuple[str, Result]]) -> Shown:
    image = scored[-1][1].images[path]
    first_and_last = [scored[0], scored[-1]] if len(scored) > 1 else scored
    return Shown(path, image.class_name, image.label, finding, tuple(
        (label, result.images[path].score, result.images[path].threshold) for label, result in first_and_last
        if path in result.images))


def thumbnail(path: str) -> Optional[str]:
    """A JPEG of at most ``SIDE`` x ``SIDE`` pixels as a data URI; None if the image can no longer be read."""
    try:
        size = image_size(path)
        pixels = read_image(path, fitted(size, min(SIDE, max(size))))
    except (UadtoolError, ValueError):  # ValueError: a path with a null byte
        return None
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
