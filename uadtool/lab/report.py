"""What training says of the images: what is odd about them, and how many of each class did what."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from uadtool.data.inspection import Inspection, inspect
from uadtool.data.samples import Sample
from uadtool.host import available_cores
from uadtool.lab.detectors.statistics import HeldOut
from uadtool.scoring.metrics import rounded
from uadtool.terminal import first_of, log

MOST_CONFUSED = 0.01
"""Share of the held-out images of two classes that may be taken for the other without a warning."""


def inspect_samples(samples: Sequence[Sample], bits: Optional[int]) -> Inspection:
    """Look at the images before any long work, and say what is odd."""
    inspection = inspect(samples, available_cores())
    if bits:
        inspection = inspection._replace(grey_bits=dict.fromkeys(inspection.grey_bits, bits))
    for finding in inspection.findings:
        log.warning("%s", finding)
    for name, found in inspection.grey_bits.items():
        log.info("16-bit grey images of %s are read with %d bits", name, found)
    return inspection


def warn_of(held_out: HeldOut) -> None:
    """Warn of each pair of classes of which more than ``MOST_CONFUSED`` are taken for the other, and of outliers."""
    totals: Counter[str] = Counter()
    confused: Counter[tuple[str, ...]] = Counter()
    for (name, nearest), count in held_out.taken_for.items():
        totals[name] += count
        if name != nearest:
            confused[tuple(sorted((name, nearest)))] += count
    for pair, count in confused.most_common():
        total = sum(totals[name] for name in pair)
        if count > MOST_CONFUSED * total:
            log.warning("%d of %d held-out images of %s are taken for the other of the two: what is normal for one "
                        "passes in the other; make them one class if their images are alike", count, total,
                        " and ".join(pair))
    if held_out.conspicuous:
        log.warning("held-out images that score far above the others of their class: %s; if they are defects, remove "
                    "them: they raise the threshold, and other defects pass",
                    first_of(held_out.conspicuous, "images"))


def map_cells(shapes: Mapping[str, tuple[int, int]], map_size: tuple[int, int]) -> dict[str, list[int]]:
    """For each class the (height, width) in pixels of its images that a cell of the anomaly map covers.

    The log names the class with the largest: a smaller defect fades.
    """
    cells = {name: [math.ceil(side / cells) for side, cells in zip(shape, map_size)] for name, shape in shapes.items()}
    worst = max(cells, key=lambda name: cells[name][0] * cells[name][1])
    log.info("a cell of the anomaly map covers %dx%d pixels of an image%s; defects much smaller than a cell fade, and "
             "a larger --image-size makes cells smaller", *cells[worst],
             f" of {worst}, and no more of others" if len(cells) > 1 else "")
    return cells


def class_counts(classes: Sequence[str], samples: Sequence[Sample], originals: Sequence[int],
                 training: Sequence[Sample], found: HeldOut, rois: Mapping[str, NDArray[np.bool_]]
                 ) -> dict[str, dict[str, Any]]:
    """For each class its images that were trained on, were held out, are copies, and were recognised when held out.

    Args:
        samples, originals: all images, and for each the number of the first that it equals.
        training: the images that were trained on, and turned copies of them.
        rois: regions of interest, whose share of the image is reported.
    """
    trained = Counter(sample.class_name for sample in training if not sample.turn)
    turns = {name: sorted({sample.turn for sample in training if sample.class_name == name} - {0}) for name in classes}
    held_out = Counter(owner for owner, _ in found.taken_for.elements())
    copies = Counter(samples[number].class_name for number, original in enumerate(originals) if number != original)
    return {name: {"training": trained[name], "held_out": held_out[name], "copies": copies[name],
                   "recognised": found.taken_for[name, name],
                   **({"roi": rounded(rois[name].mean())} if name in rois else {}),
                   **({"turns": turns[name]} if turns[name] else {})} for name in classes}
