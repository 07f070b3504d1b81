"""From a path or URL to samples: images, each with its class, label and mask as far as they are known.

Supported are

- a folder of classes as in MVTec AD: ``CLASS/train/good/*``, ``CLASS/test/good/*``, ``CLASS/test/DEFECT/*``, and masks
  ``CLASS/ground_truth/DEFECT/STEM_mask.png`` (or ``STEM.png``);
- one such class folder;
- a manifest, CSV with a header or JSON Lines: ``path`` and, if known, ``class``, ``label`` (good, normal, ok, 0 or
  false; empty is unknown; anything else is anomalous), ``mask`` and ``split`` (train or test). Relative paths start at
  the manifest's folder. If no row has a class, the manifest's name is the class. Rows without a split are in both;
- for scoring, also any folder of images, and single images.

Names of classes are in NFC: a keyboard writes a letter and its accent as one character, but a Mac names a folder in
two (NFD). Paths stay as they are.

For scoring, all of them may be at a URL. Hidden files and folders are ignored.
"""
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Collection, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from uadtool.data import manifest, storage
from uadtool.data.images import image_size
from uadtool.data.storage import Folder
from uadtool.errors import MissingPackage, UadtoolError, reading
from uadtool.files import file_digest
from uadtool.terminal import log

SUFFIXES = {
    ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
}
GOOD_LABELS = {"good", "normal", "ok", "0", "0.0", "false"}  # pandas writes 0.0 when other labels are missing

PLACES = ("train", "test", "ground_truth")
"""The folders in a class folder."""


@dataclass(frozen=True)
class Sample:
    """An image and what the layout says about it.

    ``label`` is "good", "anomalous" or None (unknown). ``mask`` is the path of the ground truth, even of a missing file
    if the layout requires it. ``problem`` is the reason why ``path`` cannot be read, if it is already known.
    """

    path: str
    class_name: Optional[str] = None
    label: Optional[str] = None
    mask: Optional[str] = None
    problem: Optional[str] = None


class Layout(NamedTuple):
    """The content of a data set. A class may have no rows; the split of a row is "train", "test" or "" (both)."""

    classes: Set[str]
    rows: List[Tuple[Sample, str]]


def training_samples(data: str, classes: Optional[Sequence[str]] = None) -> List[Sample]:
    """The good training images of a data set, sorted by class and path; each has a class.

    The whole data set is checked, so that no long run starts on a broken one; ``classes`` limits it to these classes.

    Raises:
        UadtoolError: no images exist; a class is unknown or has no training images; an image is empty or missing; a
            mask is missing or differs in size from its image; an image is in train and in test.
    """
    data = storage.local(data)
    _require_local(data)
    if not storage.exists(data):
        raise UadtoolError(f"{data} does not exist")
    layout = _read_layout(data, _folder(data))
    if layout is None or not layout.classes:
        raise UadtoolError(f"no images to train on in {data}; give a folder with CLASS/train/good/*, one such CLASS "
                           "folder, or a manifest (.csv, .jsonl)")
    names = set(map(_class_name, classes or layout.classes))
    if names - layout.classes:
        raise UadtoolError(f"{data} has no class {_names(names - layout.classes)}; it has {_names(layout.classes)}")
    nameless = [sample.path for sample, _ in layout.rows if not sample.class_name]
    if nameless and not classes:
        raise UadtoolError(f"{data} gives classes, but none for {nameless[0]}")
    rows = [(sample, split) for sample, split in layout.rows if sample.class_name in names]
    for sample, _ in rows:
        _require_local(sample.path)
        _require_local(sample.mask or "")
    if any(sample.label == "anomalous" and not split for sample, split in rows):
        log.warning("%s gives some images no split, so they are used for training and for testing; to compare models "
                    "fairly, give each image the split train or test", data)
    training = list(dict.fromkeys(sample for sample, split in rows if split != "test" and sample.label == "good"))
    for name in sorted(names - {sample.class_name for sample in training}):
        others = sum(sample.class_name == name for sample, _ in rows)
        problem = f"no good training images, only {others} other images" if others else "no images"
        raise UadtoolError(f"class {name} of {data} has {problem}; put good images into its train/good (or label them "
                           "good in the manifest), or choose other classes")
    _check_masks(sample for sample, split in rows if split != "train")
    _check_apart(training, [sample for sample, split in rows if split == "test"])
    return sorted(training, key=lambda sample: (sample.class_name, sample.path))


def scoring_samples(paths: Iterable[str], strict: bool = True) -> Iterator[Sample]:
    """Yield the images to score, path by path.

    A data set yields its test split, with classes, labels and masks; any other folder yields all its images. Any other
    path is an image, even if it does not exist: reading it reports the error. The same holds for URLs, except that a
    URL that ends like an image is not asked whether it is a folder.

    Args:
        strict: raise errors; otherwise a path without images yields a sample with the error as ``problem``.

    Raises:
        UadtoolError: a folder has no images to score, or a manifest is broken.
        MissingPackage: the package that fsspec needs for a kind of URL is not installed.
    """
    for name in map(storage.local, paths):
        try:
            samples = _samples_of(name)
        except UadtoolError as error:
            if strict or isinstance(error, MissingPackage):
                raise
            samples = [Sample(name, problem=str(error))]
        yield from samples


def _samples_of(name: str) -> List[Sample]:
    """The images to score at a path or URL."""
    folder = _folder(name)
    layout = _read_layout(name, folder)
    if layout is not None:
        samples = [sample for sample, split in layout.rows if split != "train"]
        ignored = _outside(folder) if folder else 0
        if ignored:
            log.warning("%s is a data set; %d images outside of CLASS/train and CLASS/test are ignored", name, ignored)
    else:
        samples = [Sample(folder.path(image)) for image in _images(folder)] if folder else [Sample(name)]
    if not samples:
        raise UadtoolError(f"no images to score in {name}")
    return samples


def _outside(folder: Folder) -> int:
    """The number of images outside of ``PLACES``, which are large and therefore not listed."""
    if _is_class(folder):
        return len(_images(folder, PLACES))
    children = folder.folders()
    return len(_images(folder, children)) + sum(len(_images(folder / child, PLACES)) for child in children)


def _names(classes: Iterable[str]) -> str:
    """The classes as ``--classes`` takes them."""
    return ", ".join(f'"{name}"' if "," in name else name for name in sorted(classes))


def _folder(name: str) -> Optional[Folder]:
    """The folder ``name`` if it is one. A URL that ends like an image or a manifest is taken for a file."""
    if storage.is_url(name) and storage.suffix(name) in SUFFIXES | manifest.SUFFIXES:
        return None
    return storage.open_folder(name)


def _read_layout(name: str, folder: Optional[Folder]) -> Optional[Layout]:
    """The data set in ``folder``, or in the manifest ``name`` if that is not a folder; None if it is neither."""
    if folder is None:
        return _read_manifest(name) if storage.suffix(name) in manifest.SUFFIXES else None
    if _is_class(folder):
        folders = {folder.name: folder}
    else:
        folders = {child: folder / child for child in folder.folders()}
        if not any(map(_is_class, folders.values())):
            return None
    return Layout(set(map(_class_name, folders)),
                  [row for name, folder in folders.items() for row in _read_class(folder, _class_name(name))])


def _class_name(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _is_class(folder: Folder) -> bool:
    return (folder / "train").exists() or (folder / "test").exists()


def _read_class(folder: Folder, name: str) -> Iterator[Tuple[Sample, str]]:
    training, test, truth = folder / "train" / "good", folder / "test", folder / "ground_truth"
    for image in _images(training):
        yield Sample(training.path(image), name, "good"), "train"
    for image in _images(test):
        defect = image.parts[0] if len(image.parts) > 1 else None
        label = "good" if defect == "good" else "anomalous" if defect else None
        yield Sample(test.path(image), name, label, _mask(truth, image) if label == "anomalous" else None), "test"


def _mask(folder: Folder, image: PurePath) -> Optional[str]:
    if not folder.has(PurePath(image.parts[0])):
        return None
    usual, short = image.with_name(f"{image.stem}_mask.png"), image.with_suffix(".png")
    return folder.path(short if folder.has(short) and not folder.has(usual) else usual)


def _images(folder: Folder, without: Collection[str] = ()) -> List[PurePath]:
    return [file for file in folder.files(without) if file.suffix.lower() in SUFFIXES]


def _read_manifest(name: str) -> Layout:
    rows = manifest.read_manifest(name)
    no_class = not any(row["class"] for row in rows)
    only_class = _class_name(PurePath(storage.without_query(name)).stem) if no_class else None
    samples = []
    for row in rows:
        label = row["label"].lower()
        samples.append((Sample(
            path=storage.beside(name, row["path"]),
            class_name=row["class"] or only_class,
            label=("good" if label in GOOD_LABELS else "anomalous") if label else None,
            mask=storage.beside(name, row["mask"]) if row["mask"] else None,
        ), row["split"]))
    return Layout({sample.class_name for sample, _ in samples if sample.class_name}, samples)


def _require_local(name: str) -> None:
    if storage.is_url(name):
        raise UadtoolError(f"{name} is remote, but training rereads its images every epoch; copy them to this machine "
                           "first")


def _check_masks(samples: Iterable[Sample]) -> None:
    """Require that masks exist and have the size of their image."""
    for sample in samples:
        if not sample.mask:
            continue
        if not storage.exists(sample.mask):
            raise UadtoolError(f"{sample.path} has no mask: {sample.mask} does not exist")
        image, mask = image_size(sample.path), image_size(sample.mask)
        if image != mask:
            raise UadtoolError(f"{sample.mask} is {mask[1]} x {mask[0]} pixels, but its image {sample.path} is "
                               f"{image[1]} x {image[0]}")


def _check_apart(training: Iterable[Sample], test: Iterable[Sample]) -> None:
    """Require that no image is in both, by its bytes. Only files of equal size are read."""
    by_size: Dict[int, Tuple[List[str], List[str]]] = defaultdict(lambda: ([], []))
    for side, samples in enumerate((training, test)):
        for sample in samples:
            by_size[_file_size(sample.path)][side].append(sample.path)
    twins = []
    for train_paths, test_paths in by_size.values():
        if train_paths and test_paths:
            digests = {file_digest(path): path for path in test_paths}
            twins += [(path, digests[digest]) for path in train_paths if (digest := file_digest(path)) in digests]
    if twins:
        raise UadtoolError(f"{len(twins)} training images are also test images, which would flatter the model; first: "
                           f"{' and '.join(min(twins))}")


def _file_size(path: str) -> int:
    with reading(path):
        size = Path(path).stat().st_size
    if not size:
        raise UadtoolError(f"{path} is empty")
    return size
