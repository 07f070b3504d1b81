"""A ``uadtool.compare/1`` record as a table for people, or as CSV for programs."""

import csv
import io
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

from tabulate import tabulate

from uadtool.terminal import printable

DECIMALS = {"": 4, "ms": 2, "images/s": 1, "MB": 1, "mJ": 1, "M": 2, "G": 3}
"""Digits after the point, by unit."""

_HEADER_WIDTH = 12
"""Longer file names break after punctuation, so that three models fit into 100 columns."""

_LINES = 40
"""A table shows the intervals of classes if it has no more lines with them."""


def as_table(record: Dict[str, Any], markdown: bool = False) -> str:
    """A column for each model, followed, except for the first model, by the change against the first.

    The confidence interval of a change stands below its image AUROC. Intervals of classes are left out if the table
    would not fit on a screen.
    """
    def name(text: str) -> str:
        return printable(text).replace("|", "\\|") if markdown else printable(text)

    def cell(text: str) -> str:
        return name(text) if markdown else _broken(name(text))

    headers = ["metric"]
    for index, model in enumerate(record["models"]):
        label = cell(model["label"])
        headers += [label, "change"] if index else [label]
    lines = []
    for label, cells in _origins(record["models"]):
        first, *others = map(cell, cells)
        lines.append([label, first, *(text for other in others for text in (other, ""))])
    with_interval = [row for row in record["rows"] if "intervals" in row]
    fits = len(lines) + len(record["rows"]) + len(with_interval) <= _LINES
    for row in record["rows"]:
        decimals = DECIMALS[row["unit"]]
        line, below = [f"{row['label']}, {row['unit']}" if row["unit"] else name(row["label"])], [""]
        intervals = row.get("intervals", [None] * len(headers))
        for index, (value, change, interval) in enumerate(zip(row["values"], row["changes"], intervals)):
            line.append("-" if value is None else f"{value:.{decimals}f}")
            below.append("")
            if index:
                line.append(_change(change, row["change"], decimals))
                below.append("..".join(f"{bound:.3f}" for bound in interval or []))
        lines.append(line)
        if any(below) and (fits or "class" not in row):
            lines.append([f"{record['confidence']:.0%} interval", *below[1:]])
    style = "pipe" if markdown else "simple"
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return f"{tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=alignment)}\n"


def _origins(models: List[Dict[str, Any]]) -> Iterator[Tuple[str, List[str]]]:
    """Rows of text that describe the models: quantization only if a model is quantized, all but the precision
    otherwise only if they differ.
    """
    sizes = [{**model, "classes": str(len(model["classes"])), "image_size": "x".join(map(str, model["image_size"])),
              "entries": str(model.get("entries", "-")), "steps": str(model.get("training", {}).get("steps", "-")),
              "trained": model.get("training", {}).get("started", "-").replace("T", " ")[:16],
              "base": model.get("training", {}).get("base", "-").rpartition(":")[2][:12]} for model in models]
    for label, key in (("method", "method"), ("teacher", "teacher"), ("classes", "classes"),
                       ("image size", "image_size"), ("entries", "entries"), ("steps", "steps"),
                       ("trained", "trained"), ("base", "base")):
        if len({model[key] for model in sizes}) > 1:
            yield label, [model[key] for model in sizes]
    yield "precision", [model["precision"] for model in models]
    quantizations = [model.get("quantization", {}) for model in models]
    for label, key in (("quantized by", "method"), ("calibration", "calibration"), ("calibrated on", "source"),
                       ("quantized networks", "scope"), ("layers in float", "float_layers")):
        if any(quantizations):
            yield label, [str(quantization.get(key, "-")) for quantization in quantizations]
    for key in ("runtime", "machine"):
        if len({model[key] for model in models}) > 1:
            yield key, [model[key] for model in models]


def _broken(label: str) -> str:
    lines = [""]
    for part in re.findall(r"[^-_/+ ]*[-_/+ ]|[^-_/+ ]+", label):
        if lines[-1] and len(lines[-1] + part) > _HEADER_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _change(change: Optional[float], kind: str, decimals: int) -> str:
    if change is None:
        return "-"
    return f"{change:+.{decimals}f}" if kind == "difference" else f"{change:.2f}x"


def as_csv(record: Dict[str, Any]) -> str:
    """A line for each metric and model, with the ``difference`` from the first model or the ``ratio`` to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "unit", "better", "model", "value", "difference", "ratio", "low", "high"])
    for row in record["rows"]:
        intervals: List[Any] = row.get("intervals", [None] * len(record["models"]))
        for model, value, change, interval in zip(record["models"], row["values"], row["changes"], intervals):
            changes = [change if row["change"] == kind else None for kind in ("difference", "ratio")]
            writer.writerow([printable(row["metric"]), row["unit"], row["better"], printable(model["label"]), value,
                             *changes, *(interval or [None, None])])
    return text.getvalue()
