"""Accuracy and latency by the size of the input, over seeds: a table, and a figure.

usage: python input_sizes.py DATA FOLDER [--sizes 192,256,320,384] [--seeds 0,1] [--train OPTIONS]

DATA is in MVTec layout. The sizes are those of ``train --image-size``. The figure is FOLDER/input-sizes.svg.
``uadtool`` must be on PATH.
"""

import json
from pathlib import Path

from growth import run
from trade_off import main


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


if __name__ == "__main__":
    main(__doc__, "192,256,320,384", "input", exported)
