"""Reading back what ``score`` and ``bench`` wrote: the figures of each model in a file."""

import json
import logging
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from uadtool.errors import UadtoolError
from uadtool.files import refuse_newer

log = logging.getLogger("uadtool")


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
    of ``comparing.comparison.METRICS``.

    Of scores alone: ``threshold``; the ``images`` that have a score, by path; ``pixels``, what the pixel metrics are
    computed from (``Evaluation.pixels``), None in files that do not hold it; ``shards``, the files that were merged;
    ``unread``, the paths of images that could not be scored; ``shard``, (I, N) of a run of ``--shard I/N``.
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
                run = replace(_result("scores", name, record, record, {}), threshold=_number(record["threshold"]),
                              shard=_shard(record.get("shard")))
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
                for known in ("uadtool.score/1", "uadtool.bench/1"):
                    refuse_newer(kind, known, name)
                raise ValueError(f"{kind!r} is not expected here")
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
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
        except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise UadtoolError(f"{name}:{line}: not a record of a score or bench file: {reason}") from error
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


def _shard(value: Any) -> Optional[Tuple[int, int]]:
    if value is None:
        return None
    index, count = value["index"], value["count"]
    if not (isinstance(index, int) and isinstance(count, int) and 1 <= index <= count):
        raise ValueError(f"there is no shard {index!r:.20} of {count!r:.20}")
    return index, count


def _scored(record: Dict[str, Any]) -> ScoredImage:
    label, class_name = record.get("label"), record.get("class")
    if label not in (None, "good", "anomalous"):
        raise ValueError(f"the label {label!r:.40} is neither good nor anomalous")
    return ScoredImage(_number(record["score"]), _number(record["raw_score"]), bool(record["anomalous"]),
                       label, None if class_name is None else _text(class_name))


def score_values(metrics: Dict[str, Any]) -> Dict[str, float]:
    """The values of a ``metrics`` object, by metric name.

    A class of the name ``pooled`` has none, for that is what the figure over all classes is called.

    Raises:
        AttributeError, TypeError, ValueError: it is none.
    """
    image_auroc = metrics.get("image_auroc", {})
    per_class = dict(image_auroc.get("per_class", {}))
    if per_class.pop("pooled", None) is not None:
        log.warning("the image AUROC of the class 'pooled' is left out: image_auroc.pooled is that over all classes")
    found = {name: metrics.get(name, {}).get("mean")
             for name in ("image_auroc", "average_precision", "f1_max", "pixel_auroc", "aupro")}
    found.update({f"image_auroc.{name}": value for name, value in per_class.items()})
    found["image_auroc.pooled"] = image_auroc.get("pooled")
    found.update({name: metrics.get(name) for name in ("false_positive_rate", "recall")})
    return {name: _share(value, name) for name, value in found.items() if value is not None}


def _bench_values(entry: Dict[str, Any]) -> Dict[str, float]:
    energies = [_number(batch["millijoules_per_image"]) for batch in entry["throughput"]
                if "millijoules_per_image" in batch]
    positive = {
        "latency_p50": entry["latency_ms"]["p50"],
        "latency_p99": entry["latency_ms"]["p99"],
        "throughput": max(_number(batch["images_per_second"]["median"]) for batch in entry["throughput"]),
        "cold_start": entry["cold_start_ms"]["median"],
        "peak_rss": _number(entry["peak_rss_bytes"]) / 1e6,
        "file_size": _number(entry["file_bytes"]) / 1e6,
        "parameters": _number(entry["parameters"]) / 1e6,
        "macs": _number(entry["macs"]) / 1e9,
    }
    return {
        **({"energy": min(energies)} if energies else {}),
        **({"gpu_memory": _number(entry["gpu_bytes"]) / 1e6} if "gpu_bytes" in entry else {}),
        **{name: _positive(value, name) for name, value in positive.items()},
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r:.40} is not a number")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{value!r:.40} is not a finite number")
    return float(value)


def _share(value: Any, name: str) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError(f"{name} is {value!r:.40}, not from 0 to 1")
    return float(value)


def _positive(value: Any, name: str) -> float:
    if not _number(value) > 0:
        raise ValueError(f"{name} is {value!r:.40}, not above 0")
    return float(value)
