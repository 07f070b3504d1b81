"""Accuracy and latency of every size of one model, over seeds: a table, and a figure of image AUROC over latency.

usage: python bank_sizes.py DATA FOLDER [--sizes 125,250,500,1250] [--seeds 0,1] [--train OPTIONS]

DATA is in MVTec layout. The figure is FOLDER/bank-sizes.svg. ``uadtool`` must be on PATH.
"""

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
from growth import run
from matplotlib import pyplot
from tabulate import tabulate

FIGURES = ("image AUROC", "pooled", "pixel AUROC", "AUPRO", "false positives", "ms", "MB")


def measured(data: Path, folder: Path, sizes: list[str], seed: str, options: list[str]) -> list[list[float]]:
    """The ``FIGURES`` of each size of a model that is trained with this seed."""
    model = folder / f"seed-{seed}.safetensors"
    run("train", "-q", data, "--sizes", ",".join(sizes), "--seed", seed, "-o", model, *options)
    paths = [folder / f"seed-{seed}-{size}.onnx" for size in sizes]
    for size, path in zip(sizes, paths):
        run("export", "-q", model, "--size", size, "-o", path)
    benches = json.loads(run("bench", "-q", *paths, "--threads", 1))["models"]
    rows = []
    for path, bench in zip(paths, benches):
        metrics = json.loads(run("score", "-q", path, data).splitlines()[-1])["metrics"]
        rows.append([metrics["image_auroc"]["mean"], metrics["image_auroc"]["pooled"],
                     *(metrics[name]["mean"] for name in ("pixel_auroc", "aupro", "false_positive_rate")),
                     bench["latency_ms"]["p50"], bench["file_bytes"] / 1e6])
    return rows


def draw(figures: np.ndarray, sizes: list[str], path: Path) -> None:
    """Image AUROC over latency: ``figures`` are [seeds, sizes, FIGURES]."""
    pyplot.rcParams["svg.hashsalt"] = "uadtool"
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for number, rows in enumerate(figures):
        axes.plot(rows[:, 5], rows[:, 0], marker="o", label=f"model {number + 1}")
    for size, row in zip(sizes, figures[0]):
        axes.annotate(size, (row[5], row[0]), xytext=(6, -10), textcoords="offset points")
    axes.set(xlabel="latency p50, ms", ylabel="mean image AUROC")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="125,250,500,1250")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--train", default="", help="options of train")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes, train = options.sizes.split(","), shlex.split(options.train)
    figures = np.array([measured(options.data, options.folder, sizes, seed, train)
                        for seed in options.seeds.split(",")])
    rows = [[size, *(" / ".join(f"{value:.{3 if column < 5 else 1}f}" for value in figures[:, place, column])
                     for column in range(len(FIGURES)))] for place, size in enumerate(sizes)]
    print(tabulate(rows, ["entries", *FIGURES], tablefmt="github"))
    draw(figures, sizes, options.folder / "bank-sizes.svg")


if __name__ == "__main__":
    main()
