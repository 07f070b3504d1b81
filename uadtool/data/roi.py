"""Regions of interest: the part of the images of a class that counts, white on black in an image of their size."""

from dataclasses import replace
from pathlib import Path
from typing import Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from uadtool.data.dataset import class_name
from uadtool.data.images import image_size, read_mask
from uadtool.data.samples import SUFFIXES, Sample
from uadtool.errors import UadtoolError, reading
from uadtool.files import file_digest, list_digest
from uadtool.terminal import first_of, log

OVERSAMPLED = 8
"""Points per side of a cell of the anomaly map that decide whether it counts: it does if half of them are white."""
LEAST_SHARE = 0.01
"""Share of the cells at least that must count: the score is the mean of so many."""


def with_roi(samples: Sequence[Sample], given: Optional[str]) -> List[Sample]:
    """The samples with another region of interest.

    Args:
        given: an image for all classes, or a folder with images that are named after classes. Others have none. With
            None the samples keep theirs.

    Raises:
        UadtoolError: the folder cannot be read, or has no such image.
    """
    if given is None:
        return list(samples)
    if not Path(given).is_dir():
        return [replace(sample, roi=given) for sample in samples]
    classes = {str(sample.class_name) for sample in samples}
    with reading(given):
        files = {class_name(file.stem): str(file) for file in sorted(Path(given).iterdir())
                 if file.suffix.lower() in SUFFIXES}
    if not files.keys() & classes:
        raise UadtoolError(f"{given} has no image of a region of interest; name each after a class, such as "
                           f"{min(classes)}.png")
    if others := sorted(files.keys() - classes):
        log.info("no class has the name of these regions of interest: %s", first_of(others, "regions"))
    return [replace(sample, roi=files.get(str(sample.class_name))) for sample in samples]


def roi_files(samples: Sequence[Sample]) -> Dict[str, str]:
    """The image of the region of interest of each class that has one."""
    return {str(sample.class_name): sample.roi for sample in samples if sample.roi}


def rois_digest(samples: Sequence[Sample]) -> Optional[str]:
    """Digest of the ``roi_files`` and their classes; None if there are none."""
    files = roi_files(samples)
    return list_digest(f"{name} {file_digest(path)}" for name, path in sorted(files.items())) if files else None


def read_rois(samples: Sequence[Sample], sizes: Mapping[str, Collection[Tuple[int, int]]], cells: Tuple[int, int]
              ) -> Dict[str, np.ndarray]:
    """The regions of interest of classes that have one: bool [h, w], which cells of the anomaly map count.

    Args:
        sizes: (height, width) of the images by class, from ``Inspection``.
        cells: (height, width) of the anomaly map.

    Raises:
        UadtoolError: a file cannot be read, has the size of no image, or marks too little.
    """
    rois = {}
    for name, path in sorted(roi_files(samples).items()):
        size = image_size(path)
        if size not in sizes[name]:
            raise UadtoolError(f"{path} has {size[1]}x{size[0]} pixels, as no image of {name} has; draw the region of "
                               "interest on one of them")
        points = read_mask(path, (cells[0] * OVERSAMPLED, cells[1] * OVERSAMPLED))
        roi = points.reshape(cells[0], OVERSAMPLED, cells[1], OVERSAMPLED).mean((1, 3)) >= 0.5
        if not points.any():
            raise UadtoolError(f"{path} is black, so nothing of {name} would count; paint white what counts")
        if roi.mean() < LEAST_SHARE:
            raise UadtoolError(f"{path} marks {roi.mean():.1%} of an image of {name}, less than {LEAST_SHARE:.0%}; cut "
                               "the images out there instead")
        rois[name] = roi
    if rois:
        log.info("only the region of interest counts: %s", first_of(
            [f"{roi.mean():.0%} of each image of {name}" for name, roi in rois.items()], "classes"))
    return rois
