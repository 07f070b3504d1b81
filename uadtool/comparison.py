"""Score and bench results of several models, joined and set against the first one."""

import logging
from pathlib import PurePath
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from uadtool import __version__
from uadtool.errors import UadtoolError
from uadtool.results import Result, read_results

CONFIDENCE = 0.95

log = logging.getLogger("uadtool")


class Metric(NamedTuple):
    """``change`` is how a further model is set against the first: by ``difference`` or by ``ratio``."""

    label: str
    unit: str
    better: str
    change: str


METRICS = {
    "image_auroc": Metric("image AUROC, mean", "", "higher", "difference"),
    "image_auroc.pooled": Metric("image AUROC, pooled", "", "higher", "difference"),
    # here follow the classes: image_auroc.CLASS
    "average_precision": Metric("average precision", "", "higher", "difference"),
    "f1_max": Metric("F1-max", "", "higher", "difference"),
    "pixel_auroc": Metric("pixel AUROC", "", "higher", "difference"),
    "aupro": Metric("AUPRO", "", "higher", "difference"),
    "false_positive_rate": Metric("false-positive rate", "", "lower", "difference"),
    "recall": Metric("recall", "", "higher", "difference"),
    "latency_p50": Metric("latency p50", "ms", "lower", "ratio"),
    "latency_p99": Metric("latency p99", "ms", "lower", "ratio"),
    "throughput": Metric("throughput", "images/s", "higher", "ratio"),
    "energy": Metric("energy per image", "mJ", "lower", "ratio"),
    "cold_start": Metric("cold start", "ms", "lower", "ratio"),
    "peak_rss": Metric("peak memory", "MB", "lower", "ratio"),
    "gpu_memory": Metric("GPU memory", "MB", "lower", "ratio"),
    "file_size": Metric("file size", "MB", "lower", "ratio"),
    "parameters": Metric("parameters", "M", "lower", "ratio"),
    "macs": Metric("MACs per image", "G", "lower", "ratio"),
}


def compare(files: Sequence[str]) -> Dict[str, Any]:
    """The ``uadtool.compare/1`` record (schemas/compare.json) of score and bench files (``-``: stdin), in any order.

    Results are joined by model digest; models keep the order of their first appearance. A second score or bench result
    of the same model opens a second column, as when one file ran on two devices. Image AUROC differences have bootstrap
    intervals where both models scored the same images.

    Raises:
        UadtoolError: a file cannot be read, one model has scores of different images, or there is no figure at all.
    """
    columns = _join(result for file in files for result in read_results(file))
    values = [{name: value for result in column.values() for name, value in result.values.items()}
              for column in columns]
    intervals = [_intervals(columns[0], column) if column is not columns[0] else {} for column in columns]
    rows = []
    for name, metric in _present(values):
        of_models = [found.get(name) for found in values]
        row = {"metric": name, **metric._asdict(), "values": of_models,
               "changes": [None, *(change(metric.change, value, of_models[0]) for value in of_models[1:])]}
        if any(name in found for found in intervals):
            row["intervals"] = [found.get(name) for found in intervals]
        rows.append(row)
    if not rows:
        raise UadtoolError("nothing to compare: the scored images have no labels, and there is no bench file")
    models = [_any(column) for column in columns]
    return {
        "schema": "uadtool.compare/1",
        "tool": f"uadtool {__version__}",
        "models": [
            {"label": label, "path": model.path, "digest": model.digest, "precision": model.precision,
             "runtime": model.runtime, "machine": model.machine,
             **({"quantization": model.quantization} if model.quantization else {}),
             "files": {kind: result.file for kind, result in column.items()}}
            for label, model, column in zip(_labels([model.path for model in models]), models, columns)
        ],
        "confidence": CONFIDENCE,
        "rows": rows,
    }


def change(kind: str, value: Optional[float], first: Optional[float]) -> Optional[float]:
    """The ``difference`` or ``ratio`` of a value to the first model's, or None if there is none.

    Rounded to nine decimals, so that 0.98 after 0.99 is -0.01 to a gate, too.
    """
    if value is None or first is None or (kind == "ratio" and first == 0):
        return None
    return round(value - first if kind == "difference" else value / first, 9)


_Column = Dict[str, Result]  # by kind: the scores of a model, its bench result, or both


def _join(results: Iterable[Result]) -> List[_Column]:
    columns: List[_Column] = []
    for result in results:
        same = [column for column in columns if _any(column).digest == result.digest]
        for column in same:
            scores = column.get("scores")
            if scores and result.kind == "scores" and scores.truth != result.truth:
                raise UadtoolError(f"{scores.file} and {result.file} hold scores of one model ({result.path}) for "
                                   "different images; compare them one at a time, or score the same paths")
        free = [column for column in same if result.kind not in column]
        if free:
            free[0][result.kind] = result
        else:
            columns.append({result.kind: result})
    return columns


def _any(column: _Column) -> Result:
    return next(iter(column.values()))


def _present(values: Iterable[Dict[str, float]]) -> Iterator[Tuple[str, Metric]]:
    """What some model has a value of, in the order of the table: the classes follow the pooled image AUROC."""
    names = {name: None for found in values for name in found}  # a set that keeps its order
    for name, metric in METRICS.items():
        if name in names:
            yield name, metric
        if name == "image_auroc.pooled":
            for of_class in names:
                if of_class not in METRICS:
                    yield of_class, metric._replace(label=f"image AUROC, {of_class[len('image_auroc.'):]}")


def _labels(paths: List[str]) -> List[str]:
    """File names, with as many folders as tell different paths apart; the same path again gets a number."""
    parsed = [PurePath(path) for path in paths]
    depth, labels = 1, [path.name for path in parsed]
    while len(set(labels)) < len(set(parsed)):
        depth += 1
        labels = [str(PurePath(*path.parts[-depth:])) for path in parsed]
    return [label if labels.index(label) == index else f"{label} ({labels[:index + 1].count(label)})"
            for index, label in enumerate(labels)]


def _intervals(first: _Column, other: _Column) -> Dict[str, Tuple[float, float]]:
    """By metric, the bounds of its difference; empty if not both models have scores of the same labelled images."""
    a, b = first.get("scores"), other.get("scores")
    if not a or not b or not a.truth or not b.truth:
        return {}
    if a.truth != b.truth:
        log.warning("%s and %s are about different images: no confidence intervals", a.file, b.file)
        return {}
    anomalous, classes = zip(*a.truth.values())
    if len(set(anomalous)) == 1:
        return {}
    from uadtool.metrics import paired_bootstrap

    scores_a, scores_b = ([result.image_scores[path] for path in a.truth] for result in (a, b))
    groups = None if None in classes else classes
    found = paired_bootstrap(anomalous, scores_a, scores_b, groups, confidence=CONFIDENCE)
    names = {"mean": "image_auroc", "pooled": "image_auroc.pooled"}
    return {names[name]: (interval.low, interval.high) for name, interval in found.items()}
