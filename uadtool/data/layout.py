"""Data sets in folders, as MVTec AD has them.

``CLASS/train/good/*`` are good images to train on, ``CLASS/test/good/*`` and ``CLASS/test/DEFECT/*`` are images to test
on, and ``CLASS/ground_truth/DEFECT/*`` are the masks of the defects. The names of these folders, except the class, may
be written in any case, and ``good`` may be any of ``samples.GOOD_LABELS``.
"""

from collections import Counter
from pathlib import PurePath
from typing import Collection, Dict, List, NamedTuple, Set, Tuple
from typing import Counter as Counts

from uadtool.data.samples import SUFFIXES, Sample, label_of
from uadtool.data.storage import Folder
from uadtool.errors import UadtoolError

TRAIN, TEST, TRUTH = "train", "test", "ground_truth"
"""The folders in a class folder."""
MASK_NAMES = ("{}_mask", "{}", "{}_label", "{}_gt")
"""Names of a mask, for an image of name ``{}``; any image suffix may follow. The first that exists is the mask."""

Row = Tuple[Sample, str]
"""A sample and its split: "train", "test" or "" (both)."""


class ClassFolder(NamedTuple):
    """What a class folder holds.

    Attributes:
        rows: the samples and the split of each, "train" or "test". A sample with a problem is a folder.
        unused: folders whose images are not used, with the number of their images.
        unmasked: images of a defect without a mask, although other images of it have masks.
        unused_masks: masks that belong to no image.
    """

    rows: List[Row]
    unused: Counts[str]
    unmasked: List[str]
    unused_masks: List[str]


def is_class(folder: Folder) -> bool:
    """Whether a folder is a class folder; one that cannot be listed is not."""
    try:
        return bool(_places(folder).keys() & {TRAIN, TEST})
    except UadtoolError:
        return False


def read_class(folder: Folder, name: str) -> ClassFolder:
    """The samples of the class ``name``. Folders that cannot be listed are samples with a problem."""
    try:
        places = _places(folder)
    except UadtoolError as error:
        return ClassFolder([(Sample(folder.path(), name, problem=str(error)), "")], Counter(), [], [])
    training, tests, truths = ([folder / place for place in places.get(kind, ())] for kind in (TRAIN, TEST, TRUTH))
    masks = _Masks(truths)
    content = ClassFolder([], Counter(), [], [])
    others, _ = images(folder, [place.name for place in (*training, *tests, *truths)])
    content.unused.update(folder.path(image.parent) for image in others)
    for split, folders in ((TRAIN, training), (TEST, tests)):
        for place in folders:
            found, problems = images(place)
            content.rows.extend((Sample(path, name, problem=problem), split) for path, problem in problems)
            for image in found:
                path, label = place.path(image), label_of(image.parts[0]) if len(image.parts) > 1 else None
                if split == TRAIN and label != "good":
                    content.unused[place.path(image.parent)] += 1
                    continue
                truth = masks.of(image) if label == "anomalous" else ()
                if label == "anomalous" and not truth and masks.shows(image.parts[0]):
                    content.unmasked.append(path)
                content.rows.append((Sample(path, name, label, truth), split))
    content.unused_masks.extend(masks.unused())
    return content


def images(folder: Folder, without: Collection[str] = ()) -> Tuple[List[PurePath], List[Tuple[str, str]]]:
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

    def of(self, image: PurePath) -> Tuple[str, ...]:
        """The masks of an image, by its path in ``test``: a file with one of ``MASK_NAMES``, or all in a folder."""
        places = [_lower(image.with_name(name.format(image.stem))) for name in MASK_NAMES]
        files = [self._by_name[place][:1] for place in places if place in self._by_name]
        folders = [self._by_folder[place] for place in places if place in self._by_folder]
        found = next(iter(files + folders), [])
        self._used.update(found)
        return tuple(found)

    def shows(self, defect: str) -> bool:
        """Whether a defect has masks."""
        return any(place.parts[:1] == (defect.lower(),) for place in self._by_folder)

    def unused(self) -> List[str]:
        """The masks that ``of`` has not returned."""
        return sorted({path for paths in self._by_name.values() for path in paths} - self._used)


def _lower(path: PurePath) -> PurePath:
    return type(path)(str(path).lower())
