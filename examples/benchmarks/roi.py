"""What a region of interest gains where the background moves, on images that are put onto a moving background.

usage: python roi.py DATA CLASS,CLASS...

Every image of these classes of DATA is reduced to 70 % in height and width, and lies in the middle of a random part of
one of the two photographs of scikit-learn. CLASS/roi.png marks the middle. Models are trained with and without it; the
other classes of DATA are in the models as they are.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate

from uadtool.data.dataset import read_dataset
from uadtool.data.samples import Sample

SHARE, PHOTOGRAPHS = 0.7, load_sample_images().images
FIGURES = ("image_auroc", "recall", "false_positive_rate")


def moving(data: str, chosen: list[str], out: Path) -> None:
    """Write the data set."""
    rows = read_dataset(data).rows
    for sample, split in rows:
        path = out / Path(sample.path).relative_to(data)
        if sample.class_name not in chosen:
            for file in (sample.path, *sample.masks):
                link = out / Path(file).relative_to(data)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(file).resolve())
            continue
        image = Image.open(sample.path).convert("RGB")
        inner = tuple(round(SHARE * side) for side in image.size)
        place = tuple((side - part) // 2 for side, part in zip(image.size, inner))
        canvas = background(sample, image.size)
        canvas.paste(image.resize(inner, Image.Resampling.BILINEAR, reducing_gap=2), place)
        save(canvas, path.with_suffix(".png"))
        for mask in sample.masks:
            marked = Image.new("L", image.size)
            marked.paste(Image.open(mask).convert("L").resize(inner, Image.Resampling.NEAREST), place)
            save(marked, out / Path(mask).relative_to(data))
        if split != "train":  # a region has the size of a training image
            continue
        region = Image.new("L", image.size)
        region.paste(255, (*place, *(start + part for start, part in zip(place, inner))))
        save(region, out / str(sample.class_name) / "roi.png")


def background(sample: Sample, size: tuple[int, ...]) -> Image.Image:
    """A random part, between a fifth and all of its sides, of a photograph."""
    generator = random.Random("/".join(Path(sample.path).parts[-4:]))
    photograph = Image.fromarray(generator.choice(PHOTOGRAPHS))
    width, height = (generator.uniform(0.2, 1) * side for side in photograph.size)
    left, top = generator.uniform(0, photograph.width - width), generator.uniform(0, photograph.height - height)
    return photograph.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def metrics(data: Path, out: Path) -> dict[str, Any]:
    """Train, export and score with the command line."""
    def run(*arguments: str) -> str:
        return subprocess.run([sys.executable, "-m", "uadtool", *arguments], check=True, stdout=subprocess.PIPE,
                              text=True).stdout

    model, graph = str(out / "m.safetensors"), str(out / "m.onnx")
    run("train", str(data), "-o", model)
    run("export", model, "-o", graph)
    found: dict[str, Any] = json.loads(run("score", graph, str(data)).splitlines()[-1])["metrics"]
    return found


def main() -> None:
    data, chosen = sys.argv[1], sys.argv[2].split(",")
    with TemporaryDirectory() as folder:
        out = Path(folder, "data")
        moving(data, chosen, out)
        found = {"with": metrics(out, Path(folder))}
        for name in chosen:
            (out / name / "roi.png").unlink()
        found["without"] = metrics(out, Path(folder))
    rows = [[name, "moving" if name in chosen else "still", *(
        f"{found[kind][figure]['per_class'][name]:.3f}"
        for figure in FIGURES for kind in ("without", "with"))]
        for name in sorted(found["with"]["image_auroc"]["per_class"])]
    print(tabulate(rows, ["class", "background", *(f"{figure} {kind}" for figure in FIGURES
                                                   for kind in ("without", "with"))], tablefmt="github",
                   disable_numparse=True))


main()
