"""Accuracy and latency of every size of one model, over seeds: a table, and a figure.

usage: python bank_sizes.py DATA FOLDER [--sizes 125,250,500,1250] [--seeds 0,1] [--train OPTIONS]

DATA is in MVTec layout. The figure is FOLDER/bank-sizes.svg. ``uadtool`` must be on PATH.
"""

from pathlib import Path

from growth import run
from trade_off import main


def exported(data: Path, folder: Path, sizes: list[str], seed: str, options: list[str]) -> tuple[list[Path], list[str]]:
    """Every size of a model that is trained with this seed."""
    model = folder / f"seed-{seed}.safetensors"
    run("train", "-q", data, "--sizes", ",".join(sizes), "--seed", seed, "-o", model, *options)
    paths = [folder / f"seed-{seed}-{size}.onnx" for size in sizes]
    for size, path in zip(sizes, paths):
        run("export", "-q", model, "--size", size, "-o", path)
    return paths, sizes


if __name__ == "__main__":
    main(__doc__, "125,250,500,1250", "bank", exported)
