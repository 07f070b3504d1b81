"""Scores of one model that came in several runs about different images, made one."""

import logging
from dataclasses import replace
from typing import Any, Callable, Iterable, List

from uadtool.errors import UadtoolError
from uadtool.results import Result, score_values

log = logging.getLogger("uadtool")


def merge_shards(results: Iterable[Result]) -> List[Result]:
    """The results, with those runs of ``score`` merged that are about one model and different images.

    A merged result stands where its first shard stood, and its figures are those of one run over all images. Runs of
    one runtime and machine go together first; then what several machines shared out. Two runs (or merged ones) of the
    very same images stay two results.

    Raises:
        UadtoolError: some images are in two shards of one model but others are not, or shards have other thresholds.
    """
    parts = [[result] for result in results]
    parts = _folded(parts, lambda a, b: (a.runtime, a.machine) == (b.runtime, b.machine))
    parts = _folded(parts, lambda a, b: True)
    merged = [_merged(part) if len(part) > 1 else part[0] for part in parts]
    for index, result in enumerate(merged):
        for other in merged[:index]:
            if _one_model(result, other):
                _require_the_same_images(other, result)
    return merged


def _folded(parts: List[List[Result]], together: Callable[[Result, Result], bool]) -> List[List[Result]]:
    found: List[List[Result]] = []
    for part in parts:
        for shards in found:
            if (_one_model(shards[0], part[0]) and together(shards[0], part[0])
                    and not any(a.images.keys() & b.images.keys() for a in shards for b in part)):
                shards += part
                break
        else:
            found.append(list(part))
    return found


def _one_model(a: Result, b: Result) -> bool:
    return a.kind == b.kind == "scores" and a.digest == b.digest


def _merged(shards: List[Result]) -> Result:
    from uadtool.evaluation import Evaluation

    first = shards[0]
    for shard in shards:
        if shard.threshold != first.threshold:
            raise UadtoolError(f"{first.file} and {shard.file} are shards of one model ({first.path}) with thresholds "
                               f"{first.threshold:g} and {shard.threshold:g}; score them with one --threshold")
    images = {path: image for shard in shards for path, image in shard.images.items()}
    evaluation = Evaluation(first.threshold)
    for image in images.values():
        if image.label:
            evaluation.add(image.class_name or "", image.label == "anomalous", image.score, image.raw_score)
    lacking = [shard.file for shard in shards if shard.truth and shard.pixels is None]
    if not lacking:
        for shard in shards:
            try:
                evaluation.merge_pixels(shard.pixels or {})
            except (AttributeError, TypeError, ValueError) as error:
                raise UadtoolError(f"{shard.file}: its summary is not that of a score file: {error}") from error
    elif any("pixel_auroc" in shard.values for shard in shards):
        log.warning("%s: no pixel metrics, for %s holds no pixel counts; score again", first.path, lacking[0])
    return replace(
        first, values=score_values(evaluation.figures()), images=images,
        pixels=None if lacking else evaluation.pixels(), shards=tuple(_distinct(shard.file for shard in shards)),
        runtime=", ".join(_distinct(shard.runtime for shard in shards)),
        machine=", ".join(_distinct(shard.machine for shard in shards)),
    )


def _require_the_same_images(a: Result, b: Result) -> None:
    both, one = a.images.keys() & b.images.keys(), a.images.keys() ^ b.images.keys()
    if one:
        raise UadtoolError(f"{a.file} and {b.file} both hold scores of {min(both)} by one model ({a.path}), but not of "
                           f"the same images altogether ({min(one)} is in one alone); give each image in one shard")
    if a.truth != b.truth:
        raise UadtoolError(f"{a.file} and {b.file} hold scores of one model ({a.path}) with other labels for the same "
                           "images; compare them one at a time")


def _distinct(names: Iterable[Any]) -> List[Any]:
    return list(dict.fromkeys(names))
