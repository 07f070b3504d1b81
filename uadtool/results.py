"""Reading back what ``score`` and ``bench`` wrote: the figures of each model in a file."""

import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from uadtool.errors import UadtoolError


class ScoredImage(NamedTuple):
    """An ``image`` line. ``anomalous`` is the verdict; ``label`` (good or anomalous) and ``class_name`` if known."""

    score: float
    raw_score: float
    anomalous: bool
    label: Optional[str]
    class_name: Optional[str]


@dataclass(frozen=True)
class Result:
    """What one run of ``score`` or ``bench`` says about one model; or several runs of ``score``, merged.

    ``kind`` is ``scores`` or ``bench``. ``quantization`` is as in the record, empty for a float model. ``runtime`` is
    what ran it, with the version, and ``machine`` the board or processor. ``values`` are by metric name, in the units
    of ``uadtool.comparison.METRICS``.

    Of scores alone: ``threshold``; the ``images`` that have a score, by path; ``pixels``, what the pixel metrics are
    computed from (``Evaluation.pixels``), None in files that do not hold it; ``shards``, the files that were merged;
    ``unread``, the paths of images that could not be scored.
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

    @property
    def source(self) -> str:
        """The file, or all that were merged, for messages."""
        return ", ".join(self.shards) or self.file

    def truth_of(self, path: str) -> Tuple[Optional[str], Optional[str]]:
        """The label and the class of an image that has a score."""
        image = self.images[path]
        return image.label, image.class_name if image.label else None

    @property
    def truth(self) -> Dict[str, Tuple[bool, Optional[str]]]:
        """For each image with a label, by path: is it anomalous, and its class."""
        return {path: (image.label == "anomalous", image.class_name)
                for path, image in self.images.items() if image.label}


def read_results(file: str) -> List[Result]:
    """The results in a score file, a bench file, or several of them one after another; ``-`` is stdin.

    Raises:
        UadtoolError: it cannot be read, is cut short, or holds something else; the message names the line.
    """
    name = "stdin" if file == "-" else file
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except OSError as error:
        raise UadtoolError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UadtoolError(f"{name} is not a score or bench file: it is not text") from error
    results: List[Result] = []
    run: Optional[Result] = None  # the scores whose lines are being read
    unread: Set[str] = set()  # of that run
    line = 0
    for line, record in _objects(text, name):
        try:
            kind = record.get("schema") or record["type"]
            if kind == "uadtool.score/1" and not run:
                run = replace(_result("scores", name, record, record, {}), threshold=_number(record["threshold"]))
                unread = set()
            elif kind == "image" and run:
                if "error" in record:
                    unread.add(_text(record["path"]))
                else:
                    run.images[_text(record["path"])] = _scored(record)
            elif kind == "summary" and run:
                results.append(replace(run, values=score_values(record.get("metrics", {})),
                                       pixels=record.get("pixels"), unread=frozenset(unread)))
                run = None
            elif kind == "uadtool.bench/1" and not run:
                results += [_result("bench", name, record, entry, _bench_values(entry)) for entry in record["models"]]
            else:
                raise ValueError(f"{kind!r} is not expected here")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: {reason}") from error
    if run:
        raise UadtoolError(f"{name}:{line}: the summary line is missing: the run was interrupted; score again")
    if not results:
        raise UadtoolError(f"{name} holds no results; give score files (JSONL) or bench files (JSON)")
    return results


def _objects(text: str, name: str) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """The JSON objects in ``text``, one after another whatever their layout, each with the line it starts on."""
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
        if not isinstance(value, dict):
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: it is not a JSON object")
        yield line, value
        content = _CONTENT.search(text, end)


_CONTENT = re.compile(r"\S")


def _result(kind: str, file: str, opening: Dict[str, Any], entry: Dict[str, Any], values: Dict[str, float]) -> Result:
    model, runtime, host = entry["model"], entry["runtime"], opening["host"]
    return Result(kind, file, str(model["path"]), str(model["digest"]), str(model["method"]), str(model["precision"]),
                  dict(model.get("quantization", {})), f"{runtime['name']} {runtime['version']}",
                  str(host.get("board") or host["cpu"]), str(opening["tool"]), str(opening["started"]), values)


def _scored(record: Dict[str, Any]) -> ScoredImage:
    return ScoredImage(_number(record["score"]), _number(record["raw_score"]), bool(record["anomalous"]),
                       record.get("label"), record.get("class"))


def score_values(metrics: Dict[str, Any]) -> Dict[str, float]:
    """The values of a ``metrics`` object, by metric name."""
    image_auroc = metrics.get("image_auroc", {})
    found = {name: metrics.get(name, {}).get("mean")
             for name in ("image_auroc", "average_precision", "f1_max", "pixel_auroc", "aupro")}
    found.update({f"image_auroc.{name}": value for name, value in image_auroc.get("per_class", {}).items()})
    found["image_auroc.pooled"] = image_auroc.get("pooled")
    found.update({name: metrics.get(name) for name in ("false_positive_rate", "recall")})
    return {name: _number(value) for name, value in found.items() if value is not None}


def _bench_values(entry: Dict[str, Any]) -> Dict[str, float]:
    optional = {
        "energy": min((batch["millijoules_per_image"] for batch in entry["throughput"]
                       if "millijoules_per_image" in batch), default=None),
        "gpu_memory": entry["gpu_bytes"] / 1e6 if "gpu_bytes" in entry else None,
    }
    return {
        **{name: _number(value) for name, value in optional.items() if value is not None},
        "latency_p50": _number(entry["latency_ms"]["p50"]),
        "latency_p99": _number(entry["latency_ms"]["p99"]),
        "throughput": max(_number(batch["images_per_second"]["median"]) for batch in entry["throughput"]),
        "cold_start": _number(entry["cold_start_ms"]["median"]),
        "peak_rss": _number(entry["peak_rss_bytes"]) / 1e6,
        "file_size": _number(entry["file_bytes"]) / 1e6,
        "parameters": _number(entry["parameters"]) / 1e6,
        "macs": _number(entry["macs"]) / 1e9,
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a text")
    return value


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a finite number")
    return number
