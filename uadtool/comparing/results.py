"""Reads score and bench files: the figures of each model."""

import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple

from uadtool.errors import UadtoolError, reading
from uadtool.schemas.json_files import refuse_newer
from uadtool.schemas.validation import validate
from uadtool.scoring.thresholds import Thresholds
from uadtool.terminal import log

BY_CLASS = ("image_auroc", "false_positive_rate", "recall")
"""Metrics whose value for each class is a metric, too: ``recall.CLASS``."""


NO_THRESHOLDS = Thresholds(math.nan)
"""Of a bench file."""


class ScoredImage(NamedTuple):
    """An ``image`` line.

    ``anomalous`` is the verdict; ``label`` (good or anomalous) and ``class_name`` if known; ``heatmap`` is the path of
    the picture from ``score --heatmaps``, and ``boxes`` (left, top, width, height) are from ``score --regions``.
    """

    score: float
    raw_score: float
    threshold: float
    anomalous: bool
    nearest_class: str
    label: Optional[str]
    class_name: Optional[str]
    heatmap: Optional[str]
    boxes: Tuple[Tuple[int, ...], ...]

    @property
    def margin(self) -> float:
        """The score above the threshold."""
        return self.score - self.threshold


@dataclass(frozen=True)
class Result:
    """The figures of one model from one run of ``score`` or ``bench``, or from several merged runs of ``score``.

    ``kind`` is ``scores`` or ``bench``. ``model`` is the object of the record (schemas/common.json). ``runtime`` is its
    name and version, ``machine`` the board or processor. ``values`` maps metric names to values in the units of
    ``comparing.comparison.METRICS``.

    The other fields are for scores: ``thresholds``; ``held_out``, an object of the run's record; ``images`` that have a
    score, by path; ``pixels``, the counts behind the pixel metrics (``Evaluation.pixels``), None if the file lacks
    them; ``shards``, the merged files; ``unread``, paths of images that could not be scored; ``shard``, (I, N) of
    ``--shard I/N``.
    """

    kind: str
    file: str
    model: Dict[str, Any]
    runtime: str
    machine: str
    tool: str
    started: str
    values: Dict[str, float]
    thresholds: Thresholds = NO_THRESHOLDS
    held_out: Dict[str, Any] = field(default_factory=dict)
    images: Dict[str, ScoredImage] = field(default_factory=dict)
    pixels: Optional[Dict[str, Any]] = None
    shards: Tuple[str, ...] = ()
    unread: FrozenSet[str] = frozenset()
    shard: Optional[Tuple[int, int]] = None

    @property
    def path(self) -> str:
        """Of the model file."""
        return str(self.model["path"])

    @property
    def digest(self) -> str:
        """Of the model file."""
        return str(self.model["digest"])

    @property
    def quantization(self) -> Dict[str, Any]:
        """How the model was quantized; empty for a float model."""
        return dict(self.model.get("quantization") or {})

    @property
    def source(self) -> str:
        """The file, or the merged files, for messages."""
        return ", ".join(self.shards) or self.file

    @property
    def truth(self) -> Dict[str, Tuple[bool, Optional[str]]]:
        """Whether each labelled image is anomalous, and its class, by path."""
        return {path: (image.label == "anomalous", image.class_name)
                for path, image in self.images.items() if image.label}


def read_results(file: str, interrupted: bool = False) -> List[Result]:
    """The results in a score file, a bench file, or several of them one after another; ``-`` is stdin.

    Args:
        interrupted: accept runs of ``score`` that go on or were killed. Their results have no ``values``, and a line
            that was cut short is left out.

    Raises:
        UadtoolError: it cannot be read, is cut short, or holds other records; the message names the line.
    """
    name = "stdin" if file == "-" else file
    try:
        with reading(name):
            text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UadtoolError(f"{name} is not a score or bench file: it is not text") from error
    results: List[Result] = []
    run: Optional[Result] = None  # the run whose lines are being read
    unread: Set[str] = set()  # of that run
    line = 0
    for line, record in _objects(text, name, interrupted):
        try:
            kind = record.get("schema") or record.get("type")
            if interrupted and run and kind == "uadtool.score/1":
                results.append(replace(run, unread=frozenset(unread)))
                run = None
            if kind == "uadtool.score/1" and not run:
                validate(record, "score#/$defs/run")
                shard = record.get("shard")
                if shard and shard["index"] > shard["count"]:
                    raise ValueError(f"shard {shard['index']} of {shard['count']} does not exist")
                run = replace(_result("scores", name, record, record, {}),
                              thresholds=Thresholds(float(record["threshold"]), record.get("thresholds") or {}),
                              held_out=record.get("held_out") or {},
                              shard=(shard["index"], shard["count"]) if shard else None)
                unread = set()
            elif kind == "image" and run:
                if record.get("error") is not None:
                    validate(record, "score#/$defs/error")
                    unread.add(record["path"])
                else:
                    validate(record, "score#/$defs/image")
                    run.images[record["path"]] = ScoredImage(
                        float(record["score"]), float(record["raw_score"]),
                        float(record.get("threshold", run.thresholds.common)), record["anomalous"],
                        record["nearest_class"], record.get("label"), record.get("class"), record.get("heatmap"),
                        tuple(tuple(region["box"]) for region in record.get("regions") or ()))
            elif kind == "drift" and run:
                validate(record, "score#/$defs/drift")
            elif kind == "summary" and run:
                validate(record, "score#/$defs/summary")
                results.append(replace(run, values=score_values(record.get("metrics") or {}),
                                       pixels=record.get("pixels"), unread=frozenset(unread)))
                run = None
            elif kind == "uadtool.bench/1" and not run:
                validate(record, "bench")
                results += [_result("bench", name, record, entry, _bench_values(entry)) for entry in record["models"]]
            else:
                for known in ("uadtool.score/1", "uadtool.bench/1"):
                    refuse_newer(kind, known, name)
                raise ValueError(f"{kind!r:.80} is not expected here" if kind else "it lacks type")
        except ValueError as error:
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: {error}") from error
    if run and interrupted:
        results.append(replace(run, unread=frozenset(unread)))
    elif run:
        raise UadtoolError(f"{name}:{line}: the summary line is missing: the run was interrupted; score again")
    if not results:
        raise UadtoolError(f"{name} holds no results; give score files (JSONL) or bench files (JSON)")
    return results


def _objects(text: str, name: str, interrupted: bool) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """The JSON objects in ``text``, in any layout, each with the line it starts on."""
    decoder = json.JSONDecoder()
    line, start = 1, 0
    content = _CONTENT.search(text)
    while content:
        line += text.count("\n", start, content.start())
        start = content.start()
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            end = text.find("\n", start)
            if interrupted and line > 1:
                log.warning("%s:%d: the line is cut short and left out", name, line)
                content = _CONTENT.search(text, end) if end >= 0 else None
                continue
            raise UadtoolError(f"{name}:{error.lineno}: not JSON, or cut short: {error.msg}") from error
        except (RecursionError, ValueError) as error:  # ValueError: a number has thousands of digits
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: {reason}") from error
        if not isinstance(value, dict):
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: it is not a JSON object")
        yield line, value
        content = _CONTENT.search(text, end)


_CONTENT = re.compile(r"\S")


def _result(kind: str, file: str, opening: Dict[str, Any], entry: Dict[str, Any], values: Dict[str, float]) -> Result:
    model, runtime, host = entry["model"], entry["runtime"], opening["host"]
    return Result(kind, file, model, f"{runtime['name']} {runtime['version']}", host.get("board") or host["cpu"],
                  opening["tool"], opening["started"], values)


def evaluated(images: Mapping[str, ScoredImage]) -> Any:
    """The ``Evaluation`` of the labelled ones of these images, without pixels."""
    from uadtool.scoring.evaluation import Evaluation  # imports NumPy

    evaluation = Evaluation()
    for image in images.values():
        if image.label:
            evaluation.add(image.class_name or "", image.label == "anomalous", image.score, image.raw_score,
                           image.anomalous)
    return evaluation


def score_values(metrics: Dict[str, Any]) -> Dict[str, float]:
    """The values of a ``metrics`` object, by metric name.

    A class named ``pooled`` is left out of image AUROC, because ``image_auroc.pooled`` is the figure over all classes.
    Files from before 2026-12 hold ``recall`` and ``false_positive_rate`` as numbers over all classes.
    """
    figures = {name: figure if isinstance(figure, dict) else {"pooled": figure} for name, figure in metrics.items()}
    values = {name: figures.get(name, {}).get("pooled" if name in ("false_positive_rate", "recall") else "mean")
              for name in ("image_auroc", "average_precision", "f1_max", "pixel_auroc", "aupro", "false_positive_rate",
                           "recall")}
    for name in BY_CLASS:
        values.update({f"{name}.{class_name}": value
                       for class_name, value in figures.get(name, {}).get("per_class", {}).items()})
    if "image_auroc.pooled" in values:
        log.warning("the image AUROC of the class 'pooled' is left out: image_auroc.pooled is that over all classes")
    values["image_auroc.pooled"] = figures.get("image_auroc", {}).get("pooled")
    return {name: float(value) for name, value in values.items() if value is not None}


def _bench_values(entry: Dict[str, Any]) -> Dict[str, float]:
    energies = [batch["millijoules_per_image"] for batch in entry["throughput"] if "millijoules_per_image" in batch]
    values = {
        "energy": min(energies, default=None),
        "gpu_memory": entry["gpu_bytes"] / 1e6 if "gpu_bytes" in entry else None,
        "latency_p50": entry["latency_ms"]["p50"],
        "latency_p99": entry["latency_ms"]["p99"],
        "throughput": max(batch["images_per_second"]["median"] for batch in entry["throughput"]),
        "cold_start": entry["cold_start_ms"]["median"],
        "peak_rss": entry["peak_rss_bytes"] / 1e6,
        "file_size": entry["file_bytes"] / 1e6,
        "parameters": entry["parameters"] / 1e6,
        "macs": entry["macs"] / 1e9,
    }
    return {name: float(value) for name, value in values.items() if value is not None}
