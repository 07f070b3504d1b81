"""Write the study's results as a table (Markdown, on stdout) and a plot (SVG).

usage: python report.py RESULTS.jsonl PLOT.svg
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from study import METHODS, SOURCES
from tabulate import tabulate

METRICS = {"image_auroc": "mean image AUROC", "pooled": "pooled image AUROC", "aupro": "AUPRO"}
PLACES = ("after", "before", "before, per tensor")
COLOURS = dict(zip(PLACES, ("#0072b2", "#d55e00", "#cc79a7")))  # Okabe and Ito 2008: safe for the colour-blind
MARKERS = dict(zip(METHODS, "os^D"))
WAYS = {("ptq", "student", "after"): "after, student", ("ptq", "all", "after"): "after, both",
        ("corrected", "all", "after"): "+ bias correction", ("qat", "all", "after"): "+ QAT",
        ("first", "all", "after"): "quantize first", ("ptq", "student", "before"): "before, student",
        ("ptq", "all", "before"): "before, both",
        ("ptq", "student", "before, per tensor"): "before, student, per tensor"}

Record = dict[str, Any]


def differences(records: list[Record], metric: str) -> dict[tuple[str, ...], list[float]]:
    """Quantized minus float, one value per seed, by detector, source, method and way."""
    base = {(r["detector"], r["seed"]): r[metric] for r in records if r["procedure"] == "float"}
    changes: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for record in records:
        way = WAYS.get((record["procedure"], record["scope"], record["quantizers"]))
        if way:
            key = record["detector"], record["source"], record["method"], way
            changes[key].append(record[metric] - base[record["detector"], record["seed"]])
    return changes


def table(records: list[Record], detector: str, metric: str) -> str:
    """A row for each source and method, a column for each way: mean and, for several seeds, half their spread."""
    changes = differences(records, metric)
    ways = [way for way in WAYS.values() if any(key[0] == detector and key[3] == way for key in changes)]
    rows = []
    for source in SOURCES:
        for method in METHODS:
            cells = [_cell(changes.get((detector, source, method, way), [])) for way in ways]
            if any(cells):
                rows.append([source, method, *cells])
    text: str = tabulate(rows, ["calibrated on", "method", *ways], tablefmt="github", disable_numparse=True)
    return text


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{spread}"


def plot(records: list[Record], path: Path) -> None:
    """Change of mean image AUROC by source; a panel for each detector and scope."""
    matplotlib.rcParams["svg.hashsalt"] = "uadtool"  # the same file from the same results
    matplotlib.rcParams["svg.fonttype"] = "none"
    panels = list(dict.fromkeys((r["detector"], r["scope"]) for r in records if r["procedure"] == "ptq"))
    height = 3.6 * ((len(panels) + 1) // 2)
    figure, grid = pyplot.subplots((len(panels) + 1) // 2, 2, figsize=(11, height), sharey="row", squeeze=False)
    base = {(r["detector"], r["seed"]): r["image_auroc"] for r in records if r["procedure"] == "float"}
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    for axes, (detector, scope) in zip(grid.flat, panels):
        axes.axhline(0, color="0.6", linewidth=1)
        for record in records:
            if (record["detector"], record["procedure"], record["scope"]) != (detector, "ptq", scope):
                continue
            shift = 0.26 * (PLACES.index(record["quantizers"]) - 1) + 0.05 * (METHODS.index(record["method"]) - 1.5)
            axes.plot(SOURCES.index(record["source"]) + shift,
                      record["image_auroc"] - base[detector, record["seed"]],
                      MARKERS[record["method"]], color=COLOURS[record["quantizers"]], markersize=5, alpha=0.85)
        axes.set_xticks(range(len(SOURCES)), SOURCES)
        axes.set_title(f"{detector}: int8 in {'student only' if scope == 'student' else 'all networks'}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("mean image AUROC, int8 - float")
    labels = ("after the activation", "before the activation", "before it, weights per tensor")
    handles: list[Artist] = [Patch(color=colour, label=f"quantizer {label}")
                             for colour, label in zip(COLOURS.values(), labels)]
    handles += [Line2D([], [], color="0.3", marker=marker, linestyle="", label=method)
                for method, marker in MARKERS.items()]
    figure.legend(handles=handles, loc="lower center", ncol=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main(results: Path, picture: Path) -> None:
    records = [json.loads(line) for line in results.read_text().splitlines()]
    plot(records, picture)
    for detector in dict.fromkeys(record["detector"] for record in records):
        for metric, name in METRICS.items():
            values = [r[metric] for r in records if r["detector"] == detector and r["procedure"] == "float"]
            print(f"### {detector}: change of {name}, float has {', '.join(f'{value:.3f}' for value in values)}\n")
            print(f"{table(records, detector, metric)}\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
