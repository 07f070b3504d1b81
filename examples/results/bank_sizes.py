"""Accuracy and latency of every size of one model, over seeds: a table, and a figure.

usage: python bank_sizes.py DATA FOLDER [--sizes 125,250,500,1250] [--seeds 0,1] [--train OPTIONS]

DATA is in MVTec layout. The figure is FOLDER/bank-sizes.svg. ``uadtool`` must be on PATH.
"""

import argparse
import shlex
from pathlib import Path

import numpy as np
from growth import run
from trade_off import draw, measure, table


def exported(data: Path, folder: Path, sizes: list[str], seed: str, options: list[str]) -> list[Path]:
    """Every size of a model that is trained with this seed."""
    model = folder / f"seed-{seed}.safetensors"
    run("train", "-q", data, "--sizes", ",".join(sizes), "--seed", seed, "-o", model, *options)
    paths = [folder / f"seed-{seed}-{size}.onnx" for size in sizes]
    for size, path in zip(sizes, paths):
        run("export", "-q", model, "--size", size, "-o", path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="125,250,500,1250")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--train", default="", help="options of train")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes, seeds, train = options.sizes.split(","), options.seeds.split(","), shlex.split(options.train)
    figures = np.array([measure(exported(options.data, options.folder, sizes, seed, train), options.data)
                        for seed in seeds])
    print(table(figures, sizes, "entries"))
    draw(figures, sizes, seeds, options.folder / "bank-sizes.svg")


if __name__ == "__main__":
    main()
