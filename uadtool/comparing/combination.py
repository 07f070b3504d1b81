"""Models that saw the same parts, combined: one score for each image (as Variant Parallelism, arXiv 2210.08376)."""

from collections import Counter
from statistics import fmean
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from uadtool.comparing.comparison import Model
from uadtool.comparing.results import Result, ScoredImage, evaluated, score_values
from uadtool.data.samples import tail
from uadtool.errors import UadtoolError
from uadtool.scoring.thresholds import Thresholds

COMBINE: Dict[str, Callable[[List[float]], float]] = {"mean": fmean, "max": max}
SLOWEST = {"latency_p50": max, "latency_p99": max, "throughput": min, "cold_start": max}
"""Figures of a bench file that models have together, each on a device of its own: those of the slowest."""


def combined(models: Sequence[Model], how: str) -> Model:
    """A model whose score of an image is the mean or the maximum of the models' scores.

    Its thresholds come from the scores of held-out images, combined in the same way. They have names in the files, so
    those that all models held out are found. An image that some models did not see has the score of the others, and the
    threshold that these have together; if only one saw it, its own.

    Args:
        how: a key of ``COMBINE``.

    Raises:
        UadtoolError: fewer than two models have scores, no image has scores of two, or two held out no image in common.
    """
    results = [model.scores for model in models if model.scores]
    if len(results) < 2:
        raise UadtoolError("a combination needs the scores of two models; give a score file of each")
    seen: Dict[Any, Dict[int, Tuple[str, ScoredImage]]] = {}
    identify = _identify(results)
    for number, result in enumerate(results):
        for path, image in result.images.items():
            seen.setdefault(identify(path), {})[number] = path, image
    if max(map(len, seen.values()), default=0) < 2:
        raise UadtoolError(f"{results[0].source} and {results[1].source} have no image in common; score the same "
                           "images with both models")
    thresholds: Dict[Tuple[int, ...], Thresholds] = {}
    images = {}
    for found in seen.values():
        (path, first), *_ = found.values()
        images[path] = first
        numbers = tuple(found)
        if len(numbers) > 1:
            if numbers not in thresholds:
                thresholds[numbers] = _thresholds([results[number] for number in numbers], how)
            images[path] = _combined([image for _, image in found.values()], thresholds[numbers], how)
    return Model(how, _result(results, how, images, thresholds), _bench(models))


def _identify(results: Sequence[Result]) -> Callable[[str], Any]:
    """What two files call the same image: the end of its path, or all of it where ends are ambiguous."""
    unique = all(max(Counter(map(tail, result.images)).values(), default=1) == 1 for result in results)
    return tail if unique else str


def _combined(images: Sequence[ScoredImage], thresholds: Thresholds, how: str) -> ScoredImage:
    score = float(f"{COMBINE[how]([image.score for image in images]):.6g}")
    first, names = images[0], {image.nearest_class for image in images}
    threshold = thresholds.of(first.nearest_class) if len(names) == 1 else thresholds.common
    return first._replace(score=score, raw_score=score, threshold=threshold, anomalous=score > threshold, heatmap=None)


def _thresholds(results: Sequence[Result], how: str) -> Thresholds:
    """From the held-out images that all these models name."""
    named = [{digest: (name, score) for name, scores in result.held_out.get("scores", {}).items()
              for digest, score in scores.items()} for result in results]
    common = set.intersection(*map(set, named))
    if not common:
        raise UadtoolError(f"the models of {' and '.join(result.source for result in results)} held out no image in "
                           "common, so their combination has no threshold; train them on the same images with the same "
                           "--seed and --held-out, and score them without --threshold SCORE")
    rates = {result.held_out["false_positive_rate"] for result in results}
    if len(rates) > 1:
        raise UadtoolError(f"{' and '.join(result.source for result in results)} were scored at different "
                           "false-positive rates; score them with the same --false-positive-rate")
    scores: Dict[str, List[float]] = {}
    for digest in sorted(common):
        names = {images[digest][0] for images in named}
        scores.setdefault(names.pop() if len(names) == 1 else "", []).append(
            COMBINE[how]([images[digest][1] for images in named]))
    return Thresholds.at(rates.pop(), scores)


def _result(results: Sequence[Result], how: str, images: Dict[str, ScoredImage],
            thresholds: Dict[Tuple[int, ...], Thresholds]) -> Result:
    def each(values: Sequence[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    first = results[0]
    model = {**{name: each([result.model[name] for result in results])
                for name in ("digest", "method", "teacher", "precision")},
             "path": f"{how} of {each([result.path for result in results])}",
             "classes": sorted({name for result in results for name in result.model["classes"]}),
             "image_size": first.model["image_size"]}
    widest = max(thresholds, key=len)
    return Result("scores", first.file, model, each([result.runtime for result in results]),
                  each([result.machine for result in results]), first.tool, first.started,
                  score_values(evaluated(images).figures()), thresholds=thresholds[widest], images=images,
                  shards=tuple(dict.fromkeys(file for result in results for file in result.shards or (result.file,))))


def _bench(models: Sequence[Model]) -> Optional[Result]:
    """The figures of the slowest, if all are known."""
    parts = [model.bench for model in models if model.scores]
    benches = [bench for bench in parts if bench]
    if len(benches) < len(parts):
        return None
    values = {name: worst(bench.values[name] for bench in benches) for name, worst in SLOWEST.items()}
    return Result("bench", benches[0].file, benches[0].model, benches[0].runtime, benches[0].machine, benches[0].tool,
                  benches[0].started, values)
