"""What becomes of classes that are added to a model later, with few or all of their images, and of cleared images.

usage: python growth.py DATA FOLDER [--base A,B,...] [--counts 1,2,4,8,16] [--seeds 0,1,2] [--train OPTIONS]

The base knows some classes of DATA, in MVTec layout; the others are added. ``uadtool`` must be on PATH.
"""

import argparse
import json
import random
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate


def run(*line: object) -> str:
    return subprocess.run(["uadtool", *map(str, line)], check=True, stdout=subprocess.PIPE, text=True).stdout


def scored(model: Path, paths: list[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of the images, and the metrics of the summary."""
    exported = model.with_suffix(".onnx")
    run("export", "-q", model, "-o", exported)
    *records, summary = map(json.loads, run("score", "-q", exported, *paths).splitlines())
    return [record for record in records if record["type"] == "image"], summary["metrics"]


def some(data: Path, classes: list[str], count: int, seed: int, folder: Path) -> Path:
    """A data set with at most ``count`` random good images of each class."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in classes:
        images, target = sorted((data / name / "train/good").iterdir()), folder / name / "train/good"
        target.mkdir(parents=True)
        for image in random.Random(seed).sample(images, min(count, len(images))):
            (target / image.name).symlink_to(image.resolve())
    return folder


def added(data: Path, folder: Path, classes: list[str], counts: list[int], seeds: list[int]) -> str:
    """A row per number of images: image AUROC of each class and the mean false-positive rate, means over seeds."""
    rows = []
    for count in counts:
        found = []
        for seed in seeds:
            part = some(data, classes, count, seed, folder / "some")
            run("train", "-q", part, "--add-to", folder / "base.safetensors", "-o", folder / "grown.safetensors")
            _, metrics = scored(folder / "grown.safetensors", [data / name for name in classes])
            found.append([*(metrics["image_auroc"]["per_class"][name] for name in classes),
                          metrics["false_positive_rate"]["mean"]])
        rows.append([count, *(f"{value:.3f}" for value in np.mean(found, axis=0))])
    return tabulate(rows, ["images", *classes, "false positives"], tablefmt="github")


def cleared(data: Path, folder: Path) -> str:
    """Extend the base by every second good test image above its threshold; a row per class with such images."""
    model, classes = folder / "base.safetensors", json.loads((folder / "base.json").read_text())["classes"]
    before = {record["path"]: record for record in scored(model, [data / name for name in classes])[0]}
    alarms = {name: [path for path, record in before.items() if record["class"] == name
                     and record["label"] == "good" and record["anomalous"]] for name in classes}
    named = [name for name, paths in alarms.items() if paths]
    if not named:
        return "no good test image is above its threshold"
    shutil.rmtree(folder / "fine", ignore_errors=True)
    for name in named:
        target = folder / "fine" / name / "train/good"
        target.mkdir(parents=True)
        for path in alarms[name][::2]:
            (target / Path(path).name).symlink_to(Path(path).resolve())
    run("train", "-q", folder / "fine", "--add-to", model, "--extend", ",".join(named), "-o",
        folder / "extended.safetensors")
    after = {record["path"]: record for record in scored(folder / "extended.safetensors", [data / n for n in named])[0]}
    rows = []
    for name in named:
        defects = [path for path, record in after.items() if (record["class"], record["label"]) == (name, "anomalous")]
        rows.append([name, *(f"{sum(after[path]['anomalous'] for path in paths)} of {len(paths)}"
                             for paths in (alarms[name][::2], alarms[name][1::2])), len(defects),
                     *(sum(records[path]["anomalous"] for path in defects) for records in (before, after))])
    return tabulate(rows, ["class", "cleared images that alarm", "others that do", "defects", "found before", "after"],
                    tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="ball_screw,magnetic_tile,pcb,solar_mono")
    parser.add_argument("--counts", default="1,2,4,8,16,1000000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", default="", help="options of train, for the base")
    options = parser.parse_args()
    folder, base = options.folder, options.base.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in options.data.iterdir() if (path / "train").is_dir() and path.name not in base)
    record = run("train", "-q", options.data, "--classes", options.base, "-o", folder / "base.safetensors",
                 *shlex.split(options.train))
    (folder / "base.json").write_text(record)
    numbers = [[int(text) for text in values.split(",")] for values in (options.counts, options.seeds)]
    print(added(options.data, folder, others, *numbers))
    print()
    print(cleared(options.data, folder))


if __name__ == "__main__":
    main()
