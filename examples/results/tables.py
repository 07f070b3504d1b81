"""Print the measurements of the Makefile as a Markdown table.

usage: python tables.py methods FOLDER... | variants FOLDER NAME... | one-class FOLDER METHOD...
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from tabulate import tabulate

METRICS = ("image_auroc.mean", "image_auroc.pooled", "pixel_auroc.mean", "aupro.mean")
NAMES = ["image AUROC", "pooled", "pixel AUROC", "AUPRO"]


def methods(folders: list[Path]) -> str:
    """Two rows per folder: the float model and the int8 model."""
    rows = []
    for folder in folders:
        training = json.loads((folder / "train.json").read_text())
        benches = [json.loads((folder / name).read_text())["models"] for name in ("bench.json", "bench-openvino.json")]
        for name, precision, one, other in zip(("unified", "unified-int8"), ("FP32", "int8"), *benches):
            rows.append([folder.name, precision, *_metrics(folder / f"{name}.scores.jsonl"),
                         f"{one['macs'] / 1e9:.2f}", f"{one['parameters'] / 1e6:.2f}", f"{one['file_bytes'] / 1e6:.1f}",
                         *(f"{bench['latency_ms']['p50']:.1f}" for bench in (one, other)),
                         f"{training['seconds'] / 60:.0f}" if precision == "FP32" else ""])
    return _table(rows, ["model", "precision", *NAMES, "GMACs", "M parameters", "MB", "ms, ONNX Runtime",
                         "ms, OpenVINO", "training, min"])


def variants(folder: Path, names: list[str]) -> str:
    """A row per name: mean over the seeds, and half the distance from the lowest to the highest."""
    rows = []
    for name in names:
        runs = [_lines(part / "unified.scores.jsonl")[-1]["metrics"] for part in sorted(folder.glob(f"{name}-seed-*"))]
        found = [_known([_get(run, metric) for run in runs]) for metric in METRICS]
        rows.append([name, *(f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}" if values else "-"
                             for values in found)])
    return _table(rows, ["model", *NAMES])


def one_class(folder: Path, names: list[str]) -> str:
    """Two rows per method: one model for all classes, and a model per class."""
    rows = []
    for name in names:
        rows.append([name, "one for all classes", *_metrics(folder / name / "unified.scores.jsonl")])
        parts = [part / "unified.scores.jsonl" for part in sorted(folder.glob(f"{name}-of-*"))]
        summaries = [_lines(part)[-1]["metrics"] for part in parts]
        found = [_known([_get(summary, metric) for summary in summaries]) for metric in METRICS]
        images = [line for part in parts for line in _lines(part) if line["type"] == "image"]
        pooled = roc_auc_score([image["label"] != "good" for image in images], [image["score"] for image in images])
        found[METRICS.index("image_auroc.pooled")] = [pooled]
        rows.append([name, "one for each class", *(f"{np.mean(values):.3f}" if values else "-" for values in found)])
    return _table(rows, ["method", "models", *NAMES])


def _metrics(scores: Path) -> list[str]:
    summary = _lines(scores)[-1]["metrics"]
    found = [_get(summary, metric) for metric in METRICS]
    return ["-" if value is None else f"{value:.3f}" for value in found]


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _get(metrics: dict[str, Any], name: str) -> float | None:
    first, second = name.split(".")
    value: float | None = metrics.get(first, {}).get(second)
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _table(rows: list[list[str]], headers: list[str]) -> str:
    text: str = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return text


if __name__ == "__main__":
    kind, first, *rest = sys.argv[1:]
    folder = Path(first)
    print(methods([folder, *map(Path, rest)]) if kind == "methods" else
          {"variants": variants, "one-class": one_class}[kind](folder, rest))
