"""A sample: an image, with its class, label and masks as far as they are known."""

import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import PurePath
from typing import Optional, Tuple

SUFFIXES = {
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
}
"""Suffixes of image files, in lower case."""
GOOD_LABELS = {"good", "normal", "ok", "0", "0.0", "false"}  # pandas writes 0.0 when other labels are missing


@dataclass(frozen=True)
class Sample:
    """An image and what the data set says about it.

    ``label`` is "good", "anomalous" or None (unknown). ``masks`` are the paths of its ground truth, to be united; a
    defect without masks has an unknown place. ``roi`` is the image that marks the region of interest of its class.
    ``problem`` is the reason why ``path`` cannot be read, if it is already known; ``path`` may then be a folder.
    ``turn`` is how the image is turned for training (``training.data.turned``). ``frame`` is the number in a stream of
    frames, from 1 on, and ``arrived`` the time when it was read.
    """

    path: str
    class_name: Optional[str] = None
    label: Optional[str] = None
    masks: Tuple[str, ...] = ()
    roi: Optional[str] = None
    problem: Optional[str] = None
    turn: int = 0
    frame: Optional[int] = None
    arrived: Optional[str] = None


def label_of(name: str) -> Optional[str]:
    """The label that a folder or a manifest names: "good" in any case and by its synonyms; None for ""."""
    if not name:
        return None
    return "good" if name.lower() in GOOD_LABELS else "anomalous"


def tail(path: str) -> Tuple[str, ...]:
    """The end of a path that identifies an image in any copy of its data set: CLASS/test/DEFECT/FILE.

    It is in NFC, since copying a data set from a Mac may change how its names are stored.
    """
    return PurePath(unicodedata.normalize("NFC", path)).parts[-4:]


def tail_digest(path: str) -> str:
    """12 hexadecimal digits that stand for the ``tail`` of a path."""
    return hashlib.sha256("/".join(tail(path)).encode("utf-8", "surrogateescape")).hexdigest()[:12]
