"""Draw the picture in the README: three generated textures, each beside its anomaly map.

usage: python picture.py FOLDER

Writes the data set, a small model and its heatmaps into FOLDER, and anomaly-maps.png beside this program. It takes
about a minute on two cores. Steps whose output exists are skipped.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from textures import draw

SHOWN = ("fabric/stain/000", "grid/scratch/000", "metal/scratch/000")
WIDTH, GAP = 412, 12
"""Pixels: each of the three parts, and the space between them."""


def uadtool(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "uadtool", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def main(folder: Path) -> None:
    parts, model, detector = folder / "parts", folder / "small.safetensors", folder / "small.onnx"
    if not parts.exists():
        draw(parts)
    if not model.exists():
        uadtool("train", parts, "-o", model, "--image-size", 128)
    if not detector.exists():
        uadtool("export", model, "-o", detector, "--images", parts)
    images = [parts / name.replace("/", "/test/", 1) for name in SHOWN]
    uadtool("score", detector, *(f"{image}.png" for image in images), "--heatmaps", folder / "heatmaps")
    pictures = [Image.open(path) for path in sorted((folder / "heatmaps").glob("*.png"))]
    pictures = [picture.resize((WIDTH, WIDTH * picture.height // picture.width)) for picture in pictures]
    joined = Image.new("RGB", ((WIDTH + GAP) * len(pictures) - GAP, pictures[0].height), "white")
    for index, picture in enumerate(pictures):
        joined.paste(picture, (index * (WIDTH + GAP), 0))
    joined.quantize(192).save(Path(__file__).with_name("anomaly-maps.png"), optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
