"""Scores of one model that came in several runs about different images, made one."""

import logging
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Iterable, List, Set, Tuple

from uadtool.errors import UadtoolError
from uadtool.results import Result, score_values

log = logging.getLogger("uadtool")


def merge_shards(results: Iterable[Result]) -> List[Result]:
    """The results, with those runs of ``score`` merged that are about one model and different images.

    A merged result stands where its first shard stood, and its figures are those of one run over all images. Runs of
    ``--shard`` are merged wherever they ran, unless one machine ran all of them. Of others only runs of one runtime and
    machine are merged, and only if no path of one ends as a path of the other does (``_tail``): the images of another
    machine, or below another folder, may be the same ones. Other runs of one model stay apart.

    Raises:
        UadtoolError: some images are in two shards of one model but each has others too, or shards have other
            thresholds or labels.
    """
    results = list(results)
    parts: List[List[Result]] = []
    tails: List[Set[Tuple[str, ...]]] = []  # of the images of each part
    for result in results:
        of_result = {_tail(path) for path in result.images}
        for part, of_part in zip(parts, tails):
            if _next_shard(part, result, results) or (_one_run(part[0], result) and not of_part & of_result):
                part.append(result)
                of_part |= of_result
                break
        else:
            parts.append([result])
            tails.append(of_result)
    for part in parts:
        _warn_of_missing(part)
    merged = [_merged(part) if len(part) > 1 else part[0] for part in parts]
    for index, result in enumerate(merged):
        for other in merged[:index]:
            if _one_model(result, other):
                _require_no_partial_overlap(other, result)
    return merged


def _tail(path: str) -> Tuple[str, ...]:
    """What tells an image wherever its data set lies: CLASS/test/DEFECT/FILE, or all of a shorter path."""
    return PurePath(path).parts[-4:]


def _one_model(a: Result, b: Result) -> bool:
    return a.kind == b.kind == "scores" and a.digest == b.digest


def _next_shard(part: List[Result], result: Result, results: List[Result]) -> bool:
    """Is it a further one of the shards in ``part``?"""
    first = part[0]
    if not (first.shard and result.shard and _one_model(first, result) and first.runtime == result.runtime
            and first.shard[1] == result.shard[1]):
        return False
    if first.machine != result.machine and (_has_all(first, results) or _has_all(result, results)):
        return False
    return not any(other.shard == result.shard or other.images.keys() & result.images.keys() for other in part)


def _has_all(shard: Result, results: List[Result]) -> bool:
    """Did the machine of this shard run all of them?"""
    assert shard.shard
    return shard.shard[1] == len({other.shard for other in results if other.shard and _one_model(other, shard)
                                  and other.shard[1] == shard.shard[1]
                                  and (other.runtime, other.machine) == (shard.runtime, shard.machine)})


def _warn_of_missing(part: List[Result]) -> None:
    found = {result.shard[0] for result in part if result.shard}
    if not (found and all(result.shard for result in part)):
        return
    count = max(result.shard[1] for result in part if result.shard)
    missing = sorted(set(range(1, min(count, 10_000) + 1)) - found)
    if missing:
        names = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        log.warning("%s: of %d shards these are missing: %s", part[0].path, count, names)


def _one_run(a: Result, b: Result) -> bool:
    return _one_model(a, b) and (a.runtime, a.machine) == (b.runtime, b.machine) and not (a.shard and b.shard)


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
    try:
        values = score_values(evaluation.figures())
    except (OverflowError, ValueError) as error:
        raise UadtoolError(f"{', '.join(shard.file for shard in shards)}: their counts of pixels do not make figures: "
                           f"{error}; score again") from error
    files = _distinct(shard.file for shard in shards)
    log.info("merged %d file%s of %s: %s", len(files), "s" * (len(files) > 1), first.path, ", ".join(files))
    return replace(
        first, values=values, images=images, pixels=None if lacking else evaluation.pixels(), shards=tuple(files),
        machine=", ".join(_distinct(shard.machine for shard in shards)),
        unread=frozenset(path for shard in shards for path in shard.unread if path not in images),
    )


def _require_no_partial_overlap(a: Result, b: Result) -> None:
    """An image that one run could not read is none that it was not given."""
    both = a.images.keys() & b.images.keys()
    if not both:
        return
    if any(a.truth_of(path) != b.truth_of(path) for path in both):
        raise UadtoolError(f"{a.source} and {b.source} hold scores of one model ({a.path}) with other labels for the "
                           "same images; compare them one at a time")
    of_a = a.images.keys() - b.images.keys() - b.unread
    of_b = b.images.keys() - a.images.keys() - a.unread
    if of_a and of_b:
        raise UadtoolError(f"{a.source} and {b.source} both hold scores of {min(both)} by one model ({a.path}), but "
                           f"not of the same images altogether ({min(of_a | of_b)} is in one alone); give each image "
                           "in one shard")
    if a.images.keys() != b.images.keys():
        log.warning("%s and %s hold scores of one model (%s), but %s is in one alone: their figures are about "
                    "different images", a.source, b.source, a.path, min(a.images.keys() ^ b.images.keys()))


def _distinct(names: Iterable[Any]) -> List[Any]:
    return list(dict.fromkeys(names))
