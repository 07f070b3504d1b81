"""Thresholds from the good images in a score file."""

from typing import Dict, List, Optional

from uadtool import __version__
from uadtool.comparing.results import read_results
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import with_thresholds


def good_scores(file: str, metadata: Metadata) -> Dict[str, List[float]]:
    """The scores of the good images in a score file by nearest class, for ``Thresholds.at``.

    Images without a label count as good, unless others have one. An image counts for its nearest class, but good images
    that were taken for another class than their own only count in the common threshold.

    Raises:
        UadtoolError: the file holds no good images, or scores of another model than that of the metadata; or as
            ``read_results``.
    """
    scores: Dict[str, List[float]] = {}
    for result in read_results(file):
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
    return scores


def with_thresholds_from(metadata: Metadata, file: str, false_positive_rate: Optional[float] = None) -> Metadata:
    """The metadata of a model with thresholds that a share of the ``good_scores`` in a file exceeds.

    Args:
        false_positive_rate: the share; that of the model if None.

    Raises:
        UadtoolError: as ``good_scores``.
    """
    scores = good_scores(file, metadata)
    step = {"command": "export --threshold-from", "tool_version": __version__, "scores": file_digest(file),
            "images": sum(map(len, scores.values()))}
    rate = metadata.false_positive_rate if false_positive_rate is None else false_positive_rate
    return with_thresholds(metadata, scores, rate).replace(provenance=[*metadata.provenance, step])
