"""From a path or URL to samples: images, each with its class, label and masks as far as they are known.

Supported are

- a folder of classes (``layout``), or one such class folder;
- a manifest (``manifest``), CSV with a header or JSON Lines: ``path`` and, if known, ``class``, ``label``, ``mask`` and
  ``split`` (train or test). Relative paths start at the manifest's folder. If no row has a class, the manifest's name
  is the class. Rows without a split are in both. A mask that is a folder stands for all masks in it;
- for scoring, also any folder of images, and single images.

Names of classes are in NFC: a keyboard writes a letter and its accent as one character, but a Mac names a folder in
two (NFD). Paths stay as they are.

For scoring, all of them may be at a URL. What ``storage.ignored`` names does not count.
"""
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePath
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from uadtool.data import manifest, storage
from uadtool.data.layout import MASK_NAMES, Dataset, Unused, images, is_class, read_class
from uadtool.data.samples import SUFFIXES, Sample, label_of
from uadtool.data.storage import Folder
from uadtool.errors import MissingPackage, UadtoolError, reading
from uadtool.files import file_digest
from uadtool.terminal import first_of, log


def training_samples(data: str, classes: Optional[Sequence[str]] = None) -> List[Sample]:
    """The good training images of a data set, sorted by class and path; each has a class.

    Only ``classes`` are read, or all if None. A class whose folder cannot be read is left out, with a warning, unless
    it is one of ``classes``.

    Raises:
        UadtoolError: no images exist; a class is unknown or has no training images; an image is empty or missing; an
            image is in train and in test.
    """
    return choose_training(data, read_dataset(data, classes), classes)


def choose_training(data: str, dataset: Dataset, classes: Optional[Sequence[str]]) -> List[Sample]:
    """The ``training_samples`` of what ``read_dataset`` found in ``data``."""
    names = set(map(class_name, classes or dataset.classes))
    nameless = [sample.path for sample, _ in dataset.rows if not sample.class_name]
    if nameless and not classes:
        raise UadtoolError(f"{data} gives classes, but none for {nameless[0]}")
    rows = [(sample, split) for sample, split in dataset.rows if sample.class_name in names and not sample.problem]
    for sample, _ in rows:
        for path in (sample.path, *sample.masks):
            _require_local(path)
    if any(sample.label == "anomalous" and not split for sample, split in rows):
        log.warning("%s gives some images no split, so they are used for training and for testing; to compare models "
                    "fairly, give each image the split train or test", data)
    problems = [sample for sample, _ in dataset.rows if sample.class_name in names and sample.problem]
    for sample in problems:
        log.warning("%s; its images are left out", sample.problem)
    training = list(dict.fromkeys(sample for sample, split in rows if split != "test" and sample.label == "good"))
    missing = names - {sample.class_name for sample in training}
    if not classes:
        missing -= {sample.class_name for sample in problems}
    for name in sorted(missing):
        raise UadtoolError(_without_images(data, name, dataset))
    if not training:
        raise UadtoolError(problems[0].problem)
    _warn_of_unused(data, dataset)
    _check_apart(training, [sample for sample, split in rows if split == "test"])
    return sorted(training, key=lambda sample: (sample.class_name, sample.path))


def read_dataset(data: str, classes: Optional[Sequence[str]] = None) -> Dataset:
    """Everything about a local data set, except the content of its images; of a folder only the given ``classes``.

    Raises:
        UadtoolError: ``data`` does not exist or is no data set, or a class is unknown.
    """
    data = storage.local(data)
    _require_local(data)
    if not storage.exists(data):
        raise UadtoolError(f"{data} does not exist")
    dataset = _read(data, _folder(data), classes)
    if dataset is None or not dataset.classes:
        raise UadtoolError(f"no images to train on in {data}; give a folder with CLASS/train/good/*, one such CLASS "
                           "folder, or a manifest (.csv, .jsonl)")
    if unknown := set(map(class_name, classes or ())) - dataset.classes:
        raise UadtoolError(f"{data} has no class {_names(unknown)}; it has {_names(dataset.classes)}")
    return dataset


def scoring_samples(paths: Iterable[str], strict: bool = True) -> Iterator[Sample]:
    """Yield the images to score, path by path.

    A data set yields its test split, with classes, labels and masks; any other folder yields all its images. A folder
    in it that cannot be listed yields a sample with a ``problem``. Any other path is an image, even if it does not
    exist: reading it reports the error. The same holds for URLs, except that a URL that ends like an image is not asked
    whether it is a folder.

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
    dataset = _read(name, folder)
    if dataset is not None:
        samples = [sample for sample, split in dataset.rows if split != "train"]
        _warn_of_unused(name, dataset)
        _warn_of_unmasked(name, dataset)
    elif folder:
        found, problems = images(folder)
        samples = [Sample(folder.path(image)) for image in found]
        samples += [Sample(path, problem=problem) for path, problem in problems]
    else:
        samples = [Sample(name)]
    if not samples:
        raise UadtoolError(f"no images to score in {name}")
    return samples


def _warn_of_unused(name: str, dataset: Dataset) -> None:
    if dataset.unused:
        log.warning("%s is a data set; %d images outside of CLASS/train/good and CLASS/test are ignored, in %s", name,
                    sum(place.images for place in dataset.unused),
                    first_of([f"{folder} ({count})" for _, folder, count in dataset.unused], "folders"))


def _warn_of_unmasked(name: str, dataset: Dataset) -> None:
    if dataset.unmasked:
        forms = ", ".join(form.format("NAME") for form in MASK_NAMES)
        log.warning("%s: %d images of defects have no mask and do not count in pixel metrics; the first is %s; a mask "
                    "is an image of one of the names %s", name, len(dataset.unmasked), dataset.unmasked[0], forms)


def _names(classes: Iterable[str]) -> str:
    """The classes as ``--classes`` takes them."""
    return ", ".join(f'"{name}"' if "," in name else name for name in sorted(classes))


def _folder(name: str) -> Optional[Folder]:
    """The folder ``name`` if it is one. A URL that ends like an image or a manifest is taken for a file."""
    if storage.is_url(name) and storage.suffix(name) in SUFFIXES | manifest.SUFFIXES:
        return None
    return storage.open_folder(name)


def _read(name: str, folder: Optional[Folder], classes: Optional[Sequence[str]] = None) -> Optional[Dataset]:
    """The data set in ``folder``, or in the manifest ``name`` if that is not a folder; None if it is neither."""
    if folder is None:
        return _read_manifest(name) if storage.suffix(name) in manifest.SUFFIXES else None
    if is_class(folder):
        folders, dataset = {folder.name: folder}, Dataset({class_name(folder.name)})
    else:
        folders = {child: folder / child for child in folder.folders()}
        if not any(map(is_class, folders.values())):
            return None
        dataset = Dataset(set(map(class_name, folders)))
        if loose := len(images(folder, list(folders))[0]):
            dataset.unused.append(Unused("", folder.path(), loose))
    chosen = set(map(class_name, classes or folders))
    for child, place in folders.items():
        if class_name(child) in chosen:
            read_class(place, class_name(child), dataset)
    return dataset


def class_name(name: str) -> str:
    """The name of a class, from that of a folder or as it was typed."""
    return unicodedata.normalize("NFC", name)


def _read_manifest(name: str) -> Dataset:
    rows = manifest.read_manifest(name)
    no_class = not any(row["class"] for row in rows)
    only_class = class_name(PurePath(storage.without_query(name)).stem) if no_class else None
    samples = [(Sample(
        path=storage.beside(name, row["path"]),
        class_name=row["class"] or only_class,
        label=label_of(row["label"]),
        masks=_masks(storage.beside(name, row["mask"])) if row["mask"] else (),
    ), row["split"]) for row in rows]
    return Dataset({sample.class_name for sample, _ in samples if sample.class_name}, samples)


def _masks(name: str) -> Tuple[str, ...]:
    """The mask of a manifest, or all masks in it if it is a folder."""
    folder = _folder(name) if storage.suffix(name) not in SUFFIXES else None
    return tuple(folder.path(mask) for mask in images(folder)[0]) if folder else (name,)


def _without_images(data: str, name: str, dataset: Dataset) -> str:
    """Why a class cannot be trained."""
    samples = [sample for sample, _ in dataset.rows if sample.class_name == name]
    if problem := next((sample.problem for sample in samples if sample.problem), None):
        return problem
    found = [f"{unused.images} in {unused.folder}" for unused in dataset.unused if unused.class_name == name]
    found += [f"{len(samples)} to test on or with other labels"] if samples else []
    problem = f"no good training images, only {', '.join(found)}" if found else "no images"
    return (f"class {name} of {data} has {problem}; put good images into its train/good (or label them good in the "
            "manifest), or choose other classes")


def _require_local(name: str) -> None:
    if storage.is_url(name):
        raise UadtoolError(f"{name} is remote, but training rereads its images every epoch; copy them to this machine "
                           "first")


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
