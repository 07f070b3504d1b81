"""Accuracy and latency of several variants of a model, over seeds: measured, as a table and as a figure."""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from growth import run
from matplotlib import pyplot
from tabulate import tabulate

FIGURES = ("image AUROC", "pooled", "pixel AUROC", "AUPRO", "false positives", "ms", "MB")
LATENCY = FIGURES.index("ms")
Exported = Callable[[Path, Path, list[str], str, list[str]], tuple[list[Path], list[str]]]
"""(data, folder, sizes, seed, options of train) -> the exported model of each size, and the names of the sizes."""


def main(usage: str, sizes: str, title: str, exported: Exported) -> None:
    """Run a program: ``usage`` is its documentation, ``sizes`` are those by default."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default=sizes)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--train", default="", help="options of train")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    seeds, found, names = options.seeds.split(","), [], list[str]()
    for seed in seeds:
        paths, names = exported(options.data, options.folder, options.sizes.split(","), seed,
                                shlex.split(options.train))
        found.append(measure(paths, options.data))
    print(table(np.array(found), names, title))
    draw(np.array(found), names, seeds, options.folder / f"{title}-sizes.svg")


def measure(models: Sequence[Path], data: Path) -> list[list[float]]:
    """The ``FIGURES`` of exported models."""
    benches = json.loads(run("bench", "-q", *models, "--threads", 1))["models"]
    rows = []
    for path, bench in zip(models, benches):
        metrics = json.loads(run("score", "-q", path, data).splitlines()[-1])["metrics"]
        rows.append([metrics["image_auroc"]["mean"], metrics["image_auroc"]["pooled"],
                     *(metrics[name]["mean"] for name in ("pixel_auroc", "aupro", "false_positive_rate")),
                     bench["latency_ms"]["p50"], bench["file_bytes"] / 1e6])
    return rows


def table(figures: np.ndarray, names: Sequence[str], title: str) -> str:
    """A row for each name, with the values of all seeds: ``figures`` are [seeds, names, FIGURES]."""
    rows = [[name, *(" / ".join(f"{value:.{3 if column < LATENCY else 1}f}" for value in figures[:, place, column])
                     for column in range(len(FIGURES)))] for place, name in enumerate(names)]
    return tabulate(rows, [title, *FIGURES], tablefmt="github", disable_numparse=True)


def draw(figures: np.ndarray, names: Sequence[str], seeds: Sequence[str], path: Path) -> None:
    """Image AUROC and AUPRO over latency, an SVG: ``figures`` are [seeds, names, FIGURES]."""
    pyplot.rcParams.update({"svg.hashsalt": "uadtool", "svg.fonttype": "none"})
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, name in zip(panels, ("image AUROC", "AUPRO")):
        column = FIGURES.index(name)
        for seed, rows in zip(seeds, figures):
            order = rows[:, LATENCY].argsort()
            axes.plot(rows[order, LATENCY], rows[order, column], marker="o", label=f"seed {seed}")
        for label, row in zip(names, figures[0]):
            axes.annotate(label, (row[LATENCY], row[column]), xytext=(5, -10), textcoords="offset points", fontsize=8)
        axes.set(xlabel="latency p50, ms", ylabel=f"mean {name}")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})
