"""Thresholds from the good images in score files."""

from typing import Dict, List, Optional, Sequence

from uadtool import __version__
from uadtool.comparing.results import Result, read_results
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import warn_of_few, with_thresholds


def good_scores(files: Sequence[str], metadata: Metadata, false_positive_rate: float) -> Dict[str, List[float]]:
    """The scores of the good images in score files by nearest class, for ``Thresholds.at``.

    Images without a label count as good, unless others have one. An image counts for its nearest class, but good images
    that were taken for another class than their own only count in the common threshold. The scores of a run that goes
    on, or was killed, count too. A warning says so if the images are too few for the ``false_positive_rate``.

    Raises:
        UadtoolError: a file holds no good images, or scores of another model than that of the metadata; or as
            ``read_results``.
    """
    scores: Dict[str, List[float]] = {}
    for file in files:
        good = [image for result in _of_model(file, metadata) for image in result.images.values()
                if image.label == "good" or not result.truth]
        if not good:
            raise UadtoolError(f"{file} holds no scores of good images; score a folder of good images")
        for image in good:
            recognised = image.class_name in (None, image.nearest_class)
            scores.setdefault(image.nearest_class if recognised else "", []).append(image.score)
    warn_of_few(sum(map(len, scores.values())), false_positive_rate)
    return scores


def _of_model(file: str, metadata: Metadata) -> List[Result]:
    """The results in a score file, which are those of this model."""
    results = read_results(file, interrupted=True)
    for result in results:
        if result.kind != "scores":
            raise UadtoolError(f"{file} is a bench file; score a folder of good images")
        for name, value in metadata.identity.items():
            if result.model[name] != value:
                raise UadtoolError(f"{file} holds scores of another model ({result.path}), which differs in its "
                                   f"{name.replace('_', ' ')}; score the good images with this one")
    return results


def with_thresholds_from(metadata: Metadata, files: Sequence[str],
                         false_positive_rate: Optional[float] = None) -> Metadata:
    """The metadata of a model with thresholds that a share of the ``good_scores`` in files exceeds.

    Args:
        false_positive_rate: the share; that of the model if None.

    Raises:
        UadtoolError: as ``good_scores``.
    """
    rate = metadata.false_positive_rate if false_positive_rate is None else false_positive_rate
    scores = good_scores(files, metadata, rate)
    step = {"command": "export --threshold-from", "tool_version": __version__,
            "scores": [file_digest(file) for file in files], "images": sum(map(len, scores.values()))}
    return with_thresholds(metadata, scores, rate).replace(provenance=[*metadata.provenance, step])
