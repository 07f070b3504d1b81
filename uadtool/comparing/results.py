"""Reads score and bench files: the figures of each model."""

import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from uadtool.errors import UadtoolError, reading
from uadtool.files import refuse_newer
from uadtool.schemas.validation import validate
from uadtool.terminal import log


class ScoredImage(NamedTuple):
    """An ``image`` line. ``anomalous`` is the verdict; ``label`` (good or anomalous) and ``class_name`` if known."""

    score: float
    raw_score: float
    anomalous: bool
    label: Optional[str]
    class_name: Optional[str]


@dataclass(frozen=True)
class Result:
    """The figures of one model from one run of ``score`` or ``bench``, or from several merged runs of ``score``.

    ``kind`` is ``scores`` or ``bench``. ``quantization`` is as in the record, empty for a float model. ``runtime`` is
    its name and version, ``machine`` the board or processor. ``values`` maps metric names to values in the units of
    ``comparing.comparison.METRICS``.

    The other fields are for scores: ``threshold``; ``images`` that have a score, by path; ``pixels``, the counts behind
    the pixel metrics (``Evaluation.pixels``), None if the file lacks them; ``shards``, the merged files; ``unread``,
    paths of images that could not be scored; ``shard``, (I, N) of ``--shard I/N``.
    """

    kind: str
    file: str
    path: str
    digest: str
    method: str
    precision: str
    quantization: Dict[str, Any]
    runtime: str
    machine: str
    tool: str
    started: str
    values: Dict[str, float]
    threshold: float = math.nan
    images: Dict[str, ScoredImage] = field(default_factory=dict)
    pixels: Optional[Dict[str, Any]] = None
    shards: Tuple[str, ...] = ()
    unread: FrozenSet[str] = frozenset()
    shard: Optional[Tuple[int, int]] = None

    @property
    def source(self) -> str:
        """The file, or the merged files, for messages."""
        return ", ".join(self.shards) or self.file

    @property
    def truth(self) -> Dict[str, Tuple[bool, Optional[str]]]:
        """Whether each labelled image is anomalous, and its class, by path."""
        return {path: (image.label == "anomalous", image.class_name)
                for path, image in self.images.items() if image.label}


def read_results(file: str) -> List[Result]:
    """The results in a score file, a bench file, or several of them one after another; ``-`` is stdin.

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
    for line, record in _objects(text, name):
        try:
            kind = record.get("schema") or record.get("type")
            if kind == "uadtool.score/1" and not run:
                validate(record, "score#/$defs/run")
                shard = record.get("shard")
                if shard and shard["index"] > shard["count"]:
                    raise ValueError(f"shard {shard['index']} of {shard['count']} does not exist")
                run = replace(_result("scores", name, record, record, {}), threshold=float(record["threshold"]),
                              shard=(shard["index"], shard["count"]) if shard else None)
                unread = set()
            elif kind == "image" and run:
                if record.get("error") is not None:
                    validate(record, "score#/$defs/error")
                    unread.add(record["path"])
                else:
                    validate(record, "score#/$defs/image")
                    run.images[record["path"]] = ScoredImage(float(record["score"]), float(record["raw_score"]),
                                                             record["anomalous"], record.get("label"),
                                                             record.get("class"))
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
    if run:
        raise UadtoolError(f"{name}:{line}: the summary line is missing: the run was interrupted; score again")
    if not results:
        raise UadtoolError(f"{name} holds no results; give score files (JSONL) or bench files (JSON)")
    return results


def _objects(text: str, name: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
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
    return Result(kind, file, model["path"], model["digest"], model["method"], model["precision"],
                  dict(model.get("quantization") or {}), f"{runtime['name']} {runtime['version']}",
                  host.get("board") or host["cpu"], opening["tool"], opening["started"], values)


def score_values(metrics: Dict[str, Any]) -> Dict[str, float]:
    """The values of a ``metrics`` object, by metric name.

    A class named ``pooled`` is left out, because ``image_auroc.pooled`` is the figure over all classes.
    """
    image_auroc = metrics.get("image_auroc") or {}
    per_class = dict(image_auroc.get("per_class", {}))
    if per_class.pop("pooled", None) is not None:
        log.warning("the image AUROC of the class 'pooled' is left out: image_auroc.pooled is that over all classes")
    values = {name: (metrics.get(name) or {}).get("mean")
              for name in ("image_auroc", "average_precision", "f1_max", "pixel_auroc", "aupro")}
    values.update({f"image_auroc.{name}": value for name, value in per_class.items()})
    values["image_auroc.pooled"] = image_auroc.get("pooled")
    values.update({name: metrics.get(name) for name in ("false_positive_rate", "recall")})
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
