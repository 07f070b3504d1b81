"""Draw a data set in MVTec layout: three classes of generated textures, with defects and their masks.

usage: python textures.py FOLDER

Each class has 30 good images to train on, and 8 good and 8 defective ones to test, of 256 x 256 pixels. The same seed
draws the same images, which anybody may use.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
Y, X = np.mgrid[:SIZE, :SIZE].astype(float)
Draw = Callable[[np.random.Generator], NDArray[np.float64]]


def fabric(random: np.random.Generator) -> NDArray[np.float64]:
    """Threads over and under each other."""
    x, y = _turned(random)
    period = random.uniform(0.34, 0.44)
    over = np.sin(x * period) * np.sin(y * period)
    return _coloured((60, 84, 122), 1 + random.uniform(0.25, 0.4) * over, random)


def metal(random: np.random.Generator) -> NDArray[np.float64]:
    """Fine streaks from left to right."""
    streaks = np.cumsum(random.normal(0, 0.01, (SIZE, SIZE)), 1) + random.normal(0, 0.07, (SIZE, 1))
    return _coloured((168, 172, 178), 1 + streaks - 0.8 * streaks.mean(1, keepdims=True), random)


def grid(random: np.random.Generator) -> NDArray[np.float64]:
    """Holes in a sheet."""
    x, y = _turned(random)
    from_hole = np.hypot(x % 32 - 16, y % 32 - 16)
    return _coloured((186, 132, 74), np.clip((from_hole - random.uniform(7, 9)) / 2, 0.18, 1), random)


def _turned(random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates in a picture of something that was laid down by hand."""
    angle, (left, top) = random.normal(0, 0.04), random.uniform(0, 32, 2)
    return X * np.cos(angle) - Y * np.sin(angle) + left, X * np.sin(angle) + Y * np.cos(angle) + top


def _coloured(colour: tuple[int, int, int], light: NDArray[np.float64], random: np.random.Generator
              ) -> NDArray[np.float64]:
    """Under a lamp that stands a little elsewhere each time, with the noise of a camera."""
    left, top = random.uniform(0, SIZE, 2)
    lamp = random.normal(1, 0.05) + 0.15 * np.exp(-((X - left) ** 2 + (Y - top) ** 2) / 2e4)
    return (lamp * light)[..., None] * np.array(colour) + random.normal(0, 5, (SIZE, SIZE, 1))


CLASSES: dict[str, Draw] = {"fabric": fabric, "grid": grid, "metal": metal}


def defect(kind: str, random: np.random.Generator) -> Image.Image:
    """The mask of one defect, 0 to 255."""
    mask = Image.new("L", (SIZE, SIZE))
    left, top = random.uniform(50, 150, 2)
    if kind == "scratch":
        steps = random.uniform((8, -9), (16, 9), (6, 2))
        path = np.cumsum(np.vstack([[left / 2 + 20, top + 20], steps]), 0)
        ImageDraw.Draw(mask).line([tuple(point) for point in path], fill=255, width=4, joint="curve")
    else:
        width, height = random.uniform(26, 52, 2)
        ImageDraw.Draw(mask).ellipse((left, top, left + width, top + height), fill=255)
    return mask


def draw(folder: Path) -> None:
    """Write the data set."""
    for number, (name, texture) in enumerate(CLASSES.items()):
        random = np.random.default_rng(number)
        for place, count in (("train/good", 30), ("test/good", 8), ("test/scratch", 4), ("test/stain", 4)):
            for index in range(count):
                pixels, kind = texture(random), Path(place).name
                if kind != "good":
                    mask = defect(kind, random)
                    _save(mask, folder / name / "ground_truth" / kind / f"{index:03}_mask.png")
                    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(1 if kind == "scratch" else 4)))[..., None]
                    target = (40 if pixels.mean() > 140 else 235) if kind == "scratch" else pixels * 0.35
                    pixels += soft / 255 * (target - pixels)
                _save(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), folder / name / place / f"{index:03}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    draw(Path(sys.argv[1]))
