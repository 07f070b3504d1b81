"""Thresholds from the good images in a score file."""

import math
from typing import Dict, List, Optional

from uadtool import __version__
from uadtool.comparing.results import read_results
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import with_thresholds
from uadtool.terminal import log


def good_scores(file: str, metadata: Metadata, false_positive_rate: float) -> Dict[str, List[float]]:
    """The scores of the good images in a score file by nearest class, for ``Thresholds.at``.

    Images without a label count as good, unless others have one. An image counts for its nearest class, but good images
    that were taken for another class than their own only count in the common threshold. The scores of a run that goes
    on, or was killed, count too. A warning says so if the images are too few for the ``false_positive_rate``.

    Raises:
        UadtoolError: the file holds no good images, or scores of another model than that of the metadata; or as
            ``read_results``.
    """
    scores: Dict[str, List[float]] = {}
    for result in read_results(file, interrupted=True):
        if result.kind != "scores":
            raise UadtoolError(f"{file} is a bench file; score a folder of good images")
        for name, value in metadata.identity.items():
            if result.model[name] != value:
                raise UadtoolError(f"{file} holds scores of another model ({result.path}), which differs in its "
                                   f"{name.replace('_', ' ')}; score the good images with this one")
        labelled = bool(result.truth)
        for image in result.images.values():
            if image.label == "good" or not labelled:
                recognised = image.class_name in (None, image.nearest_class)
                scores.setdefault(image.nearest_class if recognised else "", []).append(image.score)
    if not scores:
        raise UadtoolError(f"{file} holds no scores of good images; score a folder of good images")
    count, needed = sum(map(len, scores.values())), math.ceil(1 / false_positive_rate) if false_positive_rate else 0
    if count < needed:
        log.warning("too few good images in %s (%d): a share of %g requires at least %d; the highest score is taken",
                    file, count, false_positive_rate, needed)
    return scores


def with_thresholds_from(metadata: Metadata, file: str, false_positive_rate: Optional[float] = None) -> Metadata:
    """The metadata of a model with thresholds that a share of the ``good_scores`` in a file exceeds.

    Args:
        false_positive_rate: the share; that of the model if None.

    Raises:
        UadtoolError: as ``good_scores``.
    """
    rate = metadata.false_positive_rate if false_positive_rate is None else false_positive_rate
    scores = good_scores(file, metadata, rate)
    step = {"command": "export --threshold-from", "tool_version": __version__, "scores": file_digest(file),
            "images": sum(map(len, scores.values()))}
    return with_thresholds(metadata, scores, rate).replace(provenance=[*metadata.provenance, step])
