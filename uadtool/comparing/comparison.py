"""Score and bench results of several models, joined and compared with the first model."""
import os
from collections import Counter
from pathlib import PurePath
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from uadtool import __version__
from uadtool.comparing.results import BY_CLASS, Result, read_results
from uadtool.comparing.shards import merge_shards
from uadtool.data.samples import tail
from uadtool.errors import UadtoolError
from uadtool.terminal import log

CONFIDENCE = 0.95
RESAMPLES = 2000


class Metric(NamedTuple):
    """``change`` is how other models are compared with the first: by ``difference`` or by ``ratio``."""

    label: str
    unit: str
    better: str
    change: str


METRICS = {  # the classes follow in the table: image_auroc.CLASS
    "image_auroc": Metric("image AUROC, mean", "", "higher", "difference"),
    "image_auroc.pooled": Metric("image AUROC, pooled", "", "higher", "difference"),
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


class Model(NamedTuple):
    """A column of the comparison: a ``label``, and scores, a bench result, or both."""

    label: str
    scores: Optional[Result]
    bench: Optional[Result]

    @property
    def any(self) -> Result:
        """One of the results, for the facts about the model itself."""
        result = self.scores or self.bench
        assert result
        return result


def compare(files: Sequence[str]) -> Dict[str, Any]:
    """The ``uadtool.compare/1`` record (schemas/compare.json) of score and bench files (``-``: stdin), in any order.

    Each of its ``rows`` is a metric, with a value for each of its ``models`` and the changes against the first model.

    Raises:
        UadtoolError: a file cannot be read, or the files hold no figures.
    """
    return set_side_by_side(join(list(map(os.fspath, files))))


def join(files: Sequence[str]) -> List[Model]:
    """The models in score and bench files (``-``: stdin), in the order of their first appearance.

    Results are joined by model digest, runtime and machine. Scores of one model for different images are merged. A
    second score or bench result of the same model opens a second column, for instance when one file ran on two devices.
    If a model has only one score result and one bench result, they are joined even across machines and runtimes.

    Raises:
        UadtoolError: a file cannot be read, or score results of one model overlap in some images only.
    """
    columns: List[Dict[str, Result]] = []  # by kind
    results = merge_shards(result for file in files for result in read_results(file))
    counts = Counter((result.digest, result.kind) for result in results)

    def belong_together(a: Result, b: Result) -> bool:
        return a.digest == b.digest and ((a.runtime, a.machine) == (b.runtime, b.machine)
                                         or all(counts[result.digest, result.kind] == 1 for result in (a, b)))

    for result in results:
        column = next((column for column in columns
                       if result.kind not in column and belong_together(_any(column), result)), None)
        if column is None:
            columns.append(column := {})
        column[result.kind] = result
    labels = _labels([_any(column).path for column in columns])
    return [Model(label, column.get("scores"), column.get("bench")) for label, column in zip(labels, columns)]


def set_side_by_side(models: Sequence[Model]) -> Dict[str, Any]:
    """The ``uadtool.compare/1`` record (schemas/compare.json): values of each model, and changes against the first.

    Metrics of scores have no changes where the models scored different images. Image AUROC differences have bootstrap
    intervals where the images have the same paths.

    Raises:
        UadtoolError: the results hold no figure.
    """
    comparable = [_have_the_same_images(models[0], model) for model in models]
    values = [{name: value for result in (model.scores, model.bench) if result
               for name, value in result.values.items()} for model in models]
    intervals = [_intervals(models[0], model) if model is not models[0] else {} for model in models]
    rows = []
    for name, class_name, metric in _present(values):
        row_values = [model_values.get(name) for model_values in values]
        row = {"metric": name, **({"class": class_name} if class_name else {}), **metric._asdict(),
               "values": row_values,
               "changes": [None, *(change(metric.change, value, row_values[0])
                                   if same or metric.change == "ratio" else None
                                   for value, same in zip(row_values[1:], comparable[1:]))]}
        if any(name in model_intervals for model_intervals in intervals):
            row["intervals"] = [model_intervals.get(name) for model_intervals in intervals]
        rows.append(row)
    if not rows:
        raise UadtoolError("nothing to compare: the scored images have no labels; score labelled images, or give a "
                           "bench file")
    return {
        "schema": "uadtool.compare/1",
        "tool": f"uadtool {__version__}",
        "models": [{**_origin(model), **({} if same else {"comparable": False})}
                   for model, same in zip(models, comparable)],
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "rows": rows,
    }


def changed(models: Sequence[Model]) -> List[Dict[str, Any]]:
    """The images on different sides of the threshold for the first model and another (schemas/changed.json).

    The image that moved farthest relative to each model's threshold comes first. Images that only one of two models
    scored are left out, with a warning.

    Raises:
        UadtoolError: fewer than two models have scores, or two models have no image in common.
    """
    scored = [(model.label, model.scores) for model in models if model.scores]
    if len(scored) < 2:
        raise UadtoolError("changed images need the scores of two models; give a score file of each")
    first, a = scored[0]
    records = []
    for other, b in scored[1:]:
        common = a.images.keys() & b.images.keys()
        if not common:
            raise UadtoolError(f"{a.source} and {b.source} have no image in common; score the same paths, spelled the "
                               "same")
        if len(common) < max(len(a.images), len(b.images)):
            log.warning("%s and %s share %d images; all others are left out", a.source, b.source, len(common))
        for path in common:
            before, after = a.images[path], b.images[path]
            if before.anomalous != after.anomalous:
                record = {"type": "changed", "path": path, "class": before.class_name, "label": before.label,
                          "models": [first, other], "scores": [before.score, after.score],
                          "thresholds": [before.threshold, after.threshold],
                          "moved": round(after.margin - before.margin, 6)}
                records.append({key: value for key, value in record.items() if value is not None})
    return sorted(records, key=lambda record: (-abs(record["moved"]), record["path"], record["models"]))


def change(kind: str, value: Optional[float], first: Optional[float]) -> Optional[float]:
    """The ``difference`` or ``ratio`` between a value and the first model's value; None if one is missing.

    Rounded to nine decimals: 0.98 - 0.99 must not be less than -0.01 for a gate.
    """
    if value is None or first is None or (kind == "ratio" and first == 0):
        return None
    return round(value - first if kind == "difference" else value / first, 9)


def _any(column: Dict[str, Result]) -> Result:
    return next(iter(column.values()))


def _origin(model: Model) -> Dict[str, Any]:
    result = model.any
    training = result.model.get("training", {})
    files = {"scores": model.scores, "bench": model.bench}
    return {
        "label": model.label, "path": result.path, "digest": result.digest,
        **{name: result.model[name] for name in ("method", "teacher", "classes", "image_size", "precision")},
        **({"entries": result.model["entries"]} if "entries" in result.model else {}),
        **({"training": training} if training else {}),
        "runtime": result.runtime, "machine": result.machine,
        **({"quantization": result.quantization} if result.quantization else {}),
        "files": {kind: result.file for kind, result in files.items() if result},
        **({"shards": list(model.scores.shards)} if model.scores and model.scores.shards else {}),
    }


def _present(values: Iterable[Dict[str, float]]) -> Iterator[Tuple[str, Optional[str], Metric]]:
    """The metrics with a value, each with the class that it is about, if any, in the order of the table.

    The classes follow the figures over all.
    """
    names = {name: None for model_values in values for name in model_values}  # a set that keeps its order
    for name, metric in METRICS.items():
        if name in names:
            yield name, None, metric
        base = name.replace(".pooled", "")
        if base not in BY_CLASS or (name == base and f"{name}.pooled" in METRICS):
            continue
        for class_metric in names:
            if class_metric.startswith(f"{base}.") and class_metric not in METRICS:
                class_name = class_metric[len(base) + 1:]
                label = f"{metric.label.replace(', pooled', '')}, {class_name}"
                yield class_metric, class_name, metric._replace(label=label)


def _labels(paths: List[str]) -> List[str]:
    """File names, with enough folders to tell different paths apart; a repeated path gets a number."""
    parsed = [PurePath(path) for path in paths]
    depth, labels = 1, [path.name for path in parsed]
    while len(set(labels)) < len(set(parsed)):
        depth += 1
        labels = [str(PurePath(*path.parts[-depth:])) for path in parsed]
    return [label if labels.index(label) == index else f"{label} ({labels[:index + 1].count(label)})"
            for index, label in enumerate(labels)]


def _have_the_same_images(first: Model, other: Model) -> bool:
    """Whether two models scored the same labelled images, perhaps below different folders; if not, warn."""
    a, b = first.scores, other.scores
    if not (a and b and a.truth and b.truth):
        return True
    one, two = ({tail(path): truth for path, truth in result.truth.items()} for result in (a, b))
    if one != two:
        log.warning("%s and %s are about different images, so that no change is given; score the same", a.source,
                    b.source)
    return one == two


def _intervals(first: Model, other: Model) -> Dict[str, Tuple[float, float]]:
    """Bounds of the differences by metric; empty unless both models have scores of the same labelled images."""
    a, b = first.scores, other.scores
    if not (a and b and a.truth and b.truth):
        return {}
    truth = a.truth
    if truth != b.truth:
        return {}
    anomalous, classes = zip(*truth.values())
    if len(set(anomalous)) == 1:
        return {}
    from uadtool.comparing.bootstrap import paired_bootstrap  # imports NumPy

    scores_a, scores_b = ([result.images[path].score for path in truth] for result in (a, b))
    differences = paired_bootstrap(anomalous, scores_a, scores_b, None if None in classes else classes,
                                   repetitions=RESAMPLES, confidence=CONFIDENCE)
    intervals = {f"image_auroc.{name}": interval for name, interval in differences.per_class.items()}
    intervals["image_auroc.pooled"] = differences.pooled
    if differences.mean:
        intervals["image_auroc"] = differences.mean
    return {name: (interval.low, interval.high) for name, interval in intervals.items()}
