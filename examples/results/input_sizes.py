"""Accuracy and latency by the size of the input, over seeds: a table, and a figure.

usage: python input_sizes.py DATA FOLDER [--sizes 192,256,320,384] [--seeds 0,1] [--train OPTIONS]

DATA is in MVTec layout. The sizes are those of ``train --image-size``. The figure is FOLDER/input-sizes.svg.
``uadtool`` must be on PATH.
"""

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
from growth import run
from trade_off import draw, measure, table


def exported(data: Path, folder: Path, sizes: list[str], seed: str, options: list[str]) -> tuple[list[Path], list[str]]:
    """A model of each size, trained with this seed, and the sizes as HEIGHTxWIDTH."""
    paths, names = [], []
    for number, size in enumerate(sizes):
        model = folder / f"seed-{seed}-{number}.safetensors"
        record = json.loads(run("train", "-q", data, "--image-size", size, "--seed", seed, "-o", model, *options))
        paths.append(model.with_suffix(".onnx"))
        run("export", "-q", model, "-o", paths[-1])
        names.append("x".join(map(str, record["image_size"])))
    return paths, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="192,256,320,384")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--train", default="", help="options of train")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = []
    seeds = options.seeds.split(",")
    for seed in seeds:
        paths, names = exported(options.data, options.folder, options.sizes.split(","), seed,
                                shlex.split(options.train))
        figures.append(measure(paths, options.data))
    print(table(np.array(figures), names, "input"))
    draw(np.array(figures), names, seeds, options.folder / "input-sizes.svg")


if __name__ == "__main__":
    main()
