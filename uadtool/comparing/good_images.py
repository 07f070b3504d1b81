"""Thresholds from the good images in score files."""

from typing import Dict, List, Optional, Sequence, Tuple

from uadtool import __version__
from uadtool.comparing.results import Result, ScoredImage, read_results
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.scoring.thresholds import warn_of_few, with_thresholds


def good_scores(files: Sequence[str], metadata: Metadata, false_positive_rate: float,
                input_size: Optional[Tuple[int, int]] = None) -> Dict[str, List[float]]:
    """The scores of the good images in score files by nearest class, for ``Thresholds.at``.

    Images without a label count as good, unless others have one. An image counts for its nearest class, but good images
    that were taken for another class than their own only count in the common threshold. The scores of a run that goes
    on, or was killed, count too. The scored model may also have taken images of the ``input_size``. A warning says so
    if the images are too few for the ``false_positive_rate``.

    Raises:
        UadtoolError: a file holds no good images, or scores of another model than that of the metadata; or as
            ``read_results``.
    """
    images: Dict[Tuple[str, float], ScoredImage] = {}  # an image that is given twice counts once
    for file in files:
        good: Dict[Tuple[str, float], ScoredImage] = {}
        for result in _of_model(file, metadata, input_size):
            labelled = bool(result.truth)
            good.update(((path, image.raw_score), image) for path, image in result.images.items()
                        if image.label == "good" or not labelled)
        if not good:
            raise UadtoolError(f"{file} holds no scores of good images; score a folder of good images")
        images.update(good)
    scores: Dict[str, List[float]] = {}
    for image in images.values():
        recognised = image.class_name in (None, image.nearest_class)
        scores.setdefault(image.nearest_class if recognised else "", []).append(image.score)
    warn_of_few(sum(map(len, scores.values())), false_positive_rate)
    return scores


def _of_model(file: str, metadata: Metadata, input_size: Optional[Tuple[int, int]]) -> List[Result]:
    """The results in a score file, which are those of this model."""
    results, own = read_results(file, interrupted=True), metadata.options.get("entries")
    for result in results:
        if result.kind != "scores":
            raise UadtoolError(f"{file} is a bench file; score a folder of good images")
        found = {**result.model, "entries": result.model.get("entries", own)}  # absent from files before 2026-12
        if input_size and tuple(found["image_size"]) == input_size:
            found["image_size"] = list(metadata.image_size)
        for name, value in {**metadata.identity, "entries": own}.items():
            if found[name] != value:
                raise UadtoolError(f"{file} holds scores of another model ({result.path}), which differs in its "
                                   f"{name.replace('_', ' ')}; score the good images with this one")
    return results


def with_thresholds_from(metadata: Metadata, files: Sequence[str], false_positive_rate: Optional[float] = None,
                         input_size: Optional[Tuple[int, int]] = None) -> Metadata:
    """The metadata of a model with thresholds that a share of the ``good_scores`` in files exceeds.

    Args:
        false_positive_rate: the share; that of the model if None.
        input_size: of a model of ``export --input-size``, which the scores may be those of.

    Raises:
        UadtoolError: as ``good_scores``.
    """
    rate = metadata.false_positive_rate if false_positive_rate is None else false_positive_rate
    scores = good_scores(files, metadata, rate, input_size)
    step = {"command": "export --threshold-from", "tool_version": __version__,
            "scores": [file_digest(file) for file in files], "images": sum(map(len, scores.values()))}
    return with_thresholds(metadata, scores, rate).replace(provenance=[*metadata.provenance, step])
