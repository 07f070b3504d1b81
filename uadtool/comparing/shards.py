"""Merges runs of ``score`` with one model over different images."""
from collections import defaultdict
from dataclasses import replace
from typing import Any, Dict, Iterable, List, Set, Tuple

from uadtool.comparing.results import Result, evaluated, score_values
from uadtool.data.samples import tail
from uadtool.errors import UadtoolError
from uadtool.schemas.validation import validate
from uadtool.terminal import log


def merge_shards(results: Iterable[Result]) -> List[Result]:
    """The results, in which runs of ``score`` with one model over different images are merged.

    A merged result stands where its first shard stood. Its figures are those of one run over all images. Runs of
    ``--shard`` are merged from all machines, unless one machine ran all shards. Other runs are merged only if they have
    one runtime and machine, and no path of one run ends like a path of the other (``tail``): images of another machine
    or below another folder may be the same images. All other runs of one model stay separate.

    Raises:
        UadtoolError: two shards of one model share some images but not all, or have different thresholds or labels.
    """
    results = list(results)
    complete = _complete(results)
    groups: List[_Group] = []
    for result in results:
        group = next((group for group in groups if group.accepts(result, complete)), None)
        if group is None:
            groups.append(group := _Group())
        group.add(result)
    for group in groups:
        _warn_of_missing(group.results)
    merged = [_merged(group.results) if len(group.results) > 1 else group.results[0] for group in groups]
    for index, result in enumerate(merged):
        for other in merged[:index]:
            if _one_model(result, other):
                _require_no_partial_overlap(other, result)
    return merged


_Place = Tuple[str, int, str, str]
"""Identifies the shards that one machine ran: model digest, number of shards, runtime, machine."""


class _Group:
    """Results that are merged."""

    def __init__(self) -> None:
        self.results: List[Result] = []
        self._paths: Set[str] = set()
        self._tails: Set[Tuple[str, ...]] = set()
        self._ends: Set[Tuple[str, ...]] = set()
        self._shards: Set[Any] = set()

    def add(self, result: Result) -> None:
        self.results.append(result)
        self._paths |= result.images.keys()
        self._tails.update(map(tail, result.images))
        self._ends.update(end for path in result.images for end in _ends(path))
        self._shards.add(result.shard)

    def accepts(self, result: Result, complete: Set[_Place]) -> bool:
        """Whether a result belongs to the same run and has other images. ``complete`` comes from ``_complete``."""
        first = self.results[0]
        if not _one_model(first, result) or first.runtime != result.runtime:
            return False
        if first.shard and result.shard:
            elsewhere = first.machine != result.machine and not complete.isdisjoint((_place(first), _place(result)))
            return (first.shard[1] == result.shard[1] and not elsewhere and result.shard not in self._shards
                    and self._paths.isdisjoint(result.images))
        return first.machine == result.machine and not any(
            tail(path) in self._ends or not self._tails.isdisjoint(_ends(path)) for path in result.images)


def _place(shard: Result) -> _Place:
    assert shard.shard
    return shard.digest, shard.shard[1], shard.runtime, shard.machine


def _complete(results: Iterable[Result]) -> Set[_Place]:
    """The places at which one machine ran all shards."""
    shards_at: Dict[_Place, Set[int]] = defaultdict(set)
    for result in results:
        if result.shard:
            shards_at[_place(result)].add(result.shard[0])
    return {place for place, shards in shards_at.items() if len(shards) == place[1]}


def _ends(path: str) -> List[Tuple[str, ...]]:
    """The tails of an image as seen from other folders."""
    parts = tail(path)
    return [parts[start:] for start in range(len(parts))]


def _one_model(a: Result, b: Result) -> bool:
    return a.kind == b.kind == "scores" and a.digest == b.digest


def _warn_of_missing(results: List[Result]) -> None:
    shards = [result.shard for result in results if result.shard]
    if len(shards) < len(results):
        return
    count = shards[0][1]
    missing = sorted(set(range(1, min(count, 10_000) + 1)) - {index for index, _ in shards})
    if missing:
        names = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        log.warning("%s: of %d shards these are missing: %s", results[0].path, count, names)


def _merged(shards: List[Result]) -> Result:
    first = shards[0]
    for shard in shards:
        if shard.thresholds != first.thresholds:
            raise UadtoolError(f"{first.file} and {shard.file} are shards of one model ({first.path}) with different "
                               "thresholds; score all with the same options")
    images = {path: image for shard in shards for path, image in shard.images.items()}
    evaluation = evaluated(images)
    without_pixels = [shard.file for shard in shards if shard.truth and shard.pixels is None]
    if not without_pixels:
        for shard in shards:
            try:
                evaluation.merge_pixels(shard.pixels or {})
            except ValueError as error:
                raise UadtoolError(f"{shard.file}: its summary is damaged: {error}; score again") from error
    elif any("pixel_auroc" in shard.values for shard in shards):
        log.warning("%s: no pixel metrics, because %s holds no pixel counts; score again", first.path,
                    without_pixels[0])
    try:
        figures = evaluation.figures()
        if figures:
            validate(figures, "score#/$defs/metrics")
    except (OverflowError, ValueError) as error:
        raise UadtoolError(f"{', '.join(shard.file for shard in shards)}: their pixel counts do not make figures: "
                           f"{error}; score again") from error
    files = tuple(dict.fromkeys(shard.file for shard in shards))
    log.info("merged %d file%s of %s: %s", len(files), "s" * (len(files) > 1), first.path, ", ".join(files))
    return replace(
        first, values=score_values(figures), images=images, shards=files,
        pixels=None if without_pixels else evaluation.pixels(),
        machine=", ".join(dict.fromkeys(shard.machine for shard in shards)),
        unread=frozenset(path for shard in shards for path in shard.unread if path not in images),
    )


def _require_no_partial_overlap(a: Result, b: Result) -> None:
    """Refuse runs that share some images but not all. Images that a run could not read count as given to it."""
    both = a.images.keys() & b.images.keys()
    if not both:
        return
    truth_a, truth_b = a.truth, b.truth
    if any(truth_a.get(path) != truth_b.get(path) for path in both):
        raise UadtoolError(f"{a.source} and {b.source} hold scores of one model ({a.path}) with different labels "
                           "for the same images; compare them one at a time")
    only_a = a.images.keys() - b.images.keys() - b.unread
    only_b = b.images.keys() - a.images.keys() - a.unread
    if only_a and only_b:
        raise UadtoolError(f"{a.source} and {b.source} both hold scores of {min(both)} by one model ({a.path}), but "
                           f"only one of them has {min(only_a | only_b)}; give each image in one shard")
    if a.images.keys() != b.images.keys():
        log.warning("%s and %s hold scores of one model (%s), but only one of them has %s: their figures are about "
                    "different images", a.source, b.source, a.path, min(a.images.keys() ^ b.images.keys()))
