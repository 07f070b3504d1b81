"""Data sets in folders, as MVTec AD has them.

``CLASS/train/good/*`` are good images to train on, ``CLASS/test/good/*`` and ``CLASS/test/DEFECT/*`` are images to test
on, and ``CLASS/ground_truth/DEFECT/*`` are the masks of the defects. ``CLASS/roi.png``, or another image of this name,
marks the region of interest. These names, except that of the class, may be written in any case, and ``good`` may be any
of ``samples.GOOD_LABELS``.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Collection, Dict, List, NamedTuple, Set, Tuple

from uadtool.data.samples import SUFFIXES, Sample, label_of
from uadtool.data.storage import Folder, Problem
from uadtool.errors import UadtoolError

TRAIN, TEST, TRUTH = "train", "test", "ground_truth"
"""The folders in a class folder."""
ROI = "roi"
"""Name, without suffix, of the image of a class folder that marks the region of interest."""
MASK_NAMES = ("{}_mask", "{}", "{}_label", "{}_gt")
"""Names of a mask, for an image of name ``{}``; any image suffix may follow. The first that exists is the mask."""

Row = Tuple[Sample, str]
"""A sample and its split: "train", "test" or "" (both)."""


class Unused(NamedTuple):
    """A folder with images that are not used; ``class_name`` is "" outside of the class folders."""

    class_name: str
    folder: str
    images: int


@dataclass
class Dataset:
    """The content of a data set.

    ``rows`` are the samples and the split of each. A class may have none. ``unmasked`` are images of a defect without a
    mask, although other images of it have masks; ``unused_masks`` belong to no image.
    """

    classes: Set[str]
    rows: List[Row] = field(default_factory=list)
    unused: List[Unused] = field(default_factory=list)
    unmasked: List[str] = field(default_factory=list)
    unused_masks: List[str] = field(default_factory=list)


def is_class(folder: Folder) -> bool:
    """Whether a folder is a class folder; one that cannot be listed is not."""
    try:
        return bool(_places(folder).keys() & {TRAIN, TEST})
    except UadtoolError:
        return False


def read_class(folder: Folder, name: str, dataset: Dataset) -> None:
    """Add the class ``name`` to the data set. Folders that cannot be listed become samples with a problem."""
    try:
        places = _places(folder)
    except UadtoolError as error:
        dataset.rows.append((Sample(folder.path(), name, problem=str(error)), ""))
        return
    training, tests, truths = ([folder / place for place in places.get(kind, ())] for kind in (TRAIN, TEST, TRUTH))
    masks = _Masks(truths)
    others, _ = images(folder, [place.name for place in (*training, *tests, *truths)])
    rois = [image for image in others if len(image.parts) == 1 and image.stem.lower() == ROI]
    roi = folder.path(rois[0]) if rois else None
    unused = Counter(folder.path(image.parent) for image in others if image not in rois[:1])
    for split, folders in ((TRAIN, training), (TEST, tests)):
        for place in folders:
            found, problems = images(place)
            dataset.rows += [(Sample(path, name, problem=problem), split) for path, problem in problems]
            for image in found:
                path, label = place.path(image), label_of(image.parts[0]) if len(image.parts) > 1 else None
                if split == TRAIN and label != "good":
                    unused[place.path(image.parent)] += 1
                    continue
                truth = masks.of(image) if label == "anomalous" else ()
                if label == "anomalous" and not truth and image.parts[0].lower() in masks.defects:
                    dataset.unmasked.append(path)
                dataset.rows.append((Sample(path, name, label, truth, roi), split))
    dataset.unused += [Unused(name, path, count) for path, count in sorted(unused.items())]
    dataset.unused_masks += masks.unused()


def images(folder: Folder, without: Collection[str] = ()) -> Tuple[List[PurePath], List[Problem]]:
    """The image files below a folder, and the folders that cannot be listed, each with the reason."""
    files, problems = folder.files(without)
    return [file for file in files if file.suffix.lower() in SUFFIXES], problems


def _places(folder: Folder) -> Dict[str, List[str]]:
    """The folders in a folder, by their names in lower case."""
    places: Dict[str, List[str]] = {}
    for name in folder.folders():
        places.setdefault(name.lower(), []).append(name)
    return places


class _Masks:
    """The masks in the ``ground_truth`` folders of a class."""

    def __init__(self, folders: List[Folder]) -> None:
        self._by_name: Dict[PurePath, List[str]] = {}  # paths of masks, by their path in the folder without suffix
        self._by_folder: Dict[PurePath, List[str]] = {}  # by the folder that holds them; keys are in lower case
        self._used: Set[str] = set()
        for folder in folders:
            for mask in images(folder)[0]:
                for key, masks in ((mask.with_suffix(""), self._by_name), (mask.parent, self._by_folder)):
                    masks.setdefault(_lower(key), []).append(folder.path(mask))
        self.defects = {place.parts[0] for place in self._by_folder if place.parts}
        """The defects that have masks, in lower case."""

    def of(self, image: PurePath) -> Tuple[str, ...]:
        """The masks of an image, by its path in ``test``: a file with one of ``MASK_NAMES``, or all in a folder."""
        places = [_lower(image.with_name(name.format(image.stem))) for name in MASK_NAMES]
        files = [self._by_name[place][:1] for place in places if place in self._by_name]
        folders = [self._by_folder[place] for place in places if place in self._by_folder]
        found = next(iter(files + folders), [])
        self._used.update(found)
        return tuple(found)

    def unused(self) -> List[str]:
        """The masks that ``of`` has not returned."""
        return sorted({path for paths in self._by_name.values() for path in paths} - self._used)


def _lower(path: PurePath) -> PurePath:
    return type(path)(str(path).lower())
