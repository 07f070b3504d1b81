"""Synthetic anomalies: good images with local defects drawn into them, and their masks.

They replace missing defective images: calibration sees the range of anomalous features, and a segmentation head has
something to learn from. No kind models a real defect; the variety matters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

Floats = NDArray[np.floating[Any]]
"""An image [H, W, 3] with values 0 to 255, or [H, W] with 1 inside of a defect and 0 outside."""
Kind = Callable[[Floats, Floats, Generator], Floats]
"""(image, donor, generator) -> the image with one more defect."""

MOST, OWN_SHARE = 3, 0.6
"""Most defects in an image, and how often the donor of a defect is the image itself."""
LEAST_CHANGE, LEAST_AREA = 8, 0.0005
"""Pixels that change by fewer levels (of 255) keep their value; at least this share of pixels must change."""


def synthetic_anomaly(image: NDArray[np.uint8], donors: Sequence[NDArray[np.uint8]],
                      generator: Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one to three defects of different kinds into a copy of a good image.

    Args:
        image: RGB, uint8 [H, W, 3].
        donors: good images of the same size, of any class, whose parts may be inserted; may be empty.
        generator: source of all randomness.

    Returns:
        The anomalous image, uint8 [H, W, 3], and its mask, bool [H, W], true exactly where they differ, never empty.
    """
    original = image.astype(np.float32)
    while True:
        changed: Floats = original
        for index in generator.permutation(len(KINDS))[:generator.integers(1, MOST + 1)]:
            own = not donors or generator.random() < OWN_SHARE
            donor = original if own else donors[int(generator.integers(len(donors)))].astype(np.float32)
            changed = KINDS[index](changed, donor, generator)
        anomalous = np.rint(changed.clip(0, 255))
        mask = np.abs(anomalous - original).max(-1) >= LEAST_CHANGE
        if mask.mean() >= LEAST_AREA:
            return np.where(mask[..., None], anomalous, original).astype(np.uint8), mask


def synthetic_anomalies(images: NDArray[np.uint8], donors: NDArray[np.uint8],
                        generator: Generator) -> NDArray[np.uint8]:
    """``synthetic_anomaly`` for each of the images [N, H, W, 3], without the masks."""
    anomalous = [synthetic_anomaly(image, list(donors), generator)[0] for image in images]
    return np.array(anomalous, np.uint8).reshape(images.shape)  # also for no images


def cut_paste(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A rectangle from elsewhere (CutPaste, Li et al., CVPR 2021)."""
    return _blend(image, _elsewhere(donor, generator), _rectangle(image, generator))


def scar(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A thin strip from elsewhere (CutPaste's second kind)."""
    sides = generator.uniform(0.06, 0.3), generator.uniform(0.008, 0.03)
    return _blend(image, _elsewhere(donor, generator), _rectangle(image, generator, sides))


def scratch(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A few thin lines side by side, lighter or darker."""
    place, angle = np.array(_place(image, generator)), generator.uniform(0, math.pi)
    alpha: Floats = np.zeros(image.shape[:2], np.float32)
    for _ in range(generator.integers(1, 5)):
        centre, bend = place + generator.normal(0, 0.02 * _side(image), 2), angle + generator.normal(0, 0.1)
        arm = generator.uniform(0.025, 0.15) * _side(image) * np.array([math.sin(bend), math.cos(bend)])
        alpha = np.maximum(alpha, _line(image, np.stack([centre - arm, centre + arm]), generator.uniform(0, 0.01)))
    return _blend(image, image + _shift(generator), generator.uniform(0.5, 1) * alpha)


def crack(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A random walk that may branch, lighter or darker."""
    def walk(start: Floats, angle: float, limit: int) -> Floats:
        angles = angle + np.cumsum(generator.normal(0, 0.35, generator.integers(limit // 4, limit)))
        moves = np.stack([np.sin(angles), np.cos(angles)], axis=1)
        return start + 0.015 * _side(image) * np.cumsum(moves, axis=0)

    angle, width = generator.uniform(0, 2 * math.pi), generator.uniform(0, 0.014)
    trunk = walk(np.array(_place(image, generator)), angle, 26)
    alpha = _line(image, trunk, width)
    for _ in range(generator.integers(0, 3)):
        branch = walk(generator.choice(trunk), angle + generator.choice([-0.8, 0.8]), 12)
        alpha = np.maximum(alpha, _line(image, branch, 0.6 * width))
    return _blend(image, image + _shift(generator), alpha)


def perlin_texture(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """Another texture, blended in where Perlin noise is high (DRAEM, Zavrtanik et al., ICCV 2021)."""
    noise = _perlin(image, int(2 ** generator.integers(2, 6)), generator)
    alpha = _blob(image, generator, (0.08, 0.3)) * (12 * (noise - generator.uniform(-0.1, 0.15))).clip(0, 1)
    if generator.random() < 0.5:
        texture = _elsewhere(donor, generator)
    else:
        grain = _perlin(image, int(2 ** generator.integers(3, 7)), generator)
        texture = _colour(image, generator) + generator.uniform(50, 200) * grain[..., None]
    return _blend(image, texture, generator.uniform(0.4, 1) * alpha)


def stain(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A soft blob of colour that covers, tints or brightens the image."""
    colour, way = _colour(image, generator), generator.integers(3)
    content = colour if way == 0 else image * colour / 255 if way == 1 else image + _shift(generator)
    return _blend(image, content, generator.uniform(0.3, 1) * _blob(image, generator))


def photometric(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A region with another contrast, gamma or gain, or inverted."""
    factor, mean = 2 ** float(generator.choice([-1, 1]) * generator.uniform(0.5, 1.5)), image.mean()
    ways = (lambda: mean + (image - mean) * factor, lambda: 255 * (image.clip(0, 255) / 255) ** factor,
            lambda: image * factor, lambda: 255 - image)
    return _blend(image, ways[generator.integers(len(ways))](), _region(image, generator))


def blur(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A region out of focus."""
    radius = generator.uniform(0.008, 0.03) * _side(image)
    blurred = Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return _blend(image, np.asarray(blurred, np.float32), _region(image, generator))


def noise(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A rough region: fine or coarse noise."""
    grain = generator.standard_normal(image.shape[:2], dtype=np.float32)
    grain = ndimage.gaussian_filter(grain, generator.choice([0, 0.7, 1.2]))
    grain *= generator.uniform(20, 70) / grain.std()
    return _blend(image, image + grain[..., None], _region(image, generator))


def warp(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A region that is pushed aside or twisted."""
    alpha = _blob(image, generator, (0.06, 0.2), softness=1)
    rows, columns = np.nonzero(alpha)
    box = np.s_[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    y, x = np.mgrid[box].astype(np.float32)
    angle, alpha = generator.uniform(0, 2 * math.pi), alpha[box]
    if generator.random() < 0.5:
        push = generator.uniform(0.03, 0.1) * _side(image) * alpha
        origin = [y + push * math.sin(angle), x + push * math.cos(angle)]
    else:
        sine, cosine = np.sin((angle - math.pi) * alpha), np.cos((angle - math.pi) * alpha)
        dy, dx = y - y.mean(), x - x.mean()
        origin = [y.mean() + cosine * dy + sine * dx, x.mean() + cosine * dx - sine * dy]
    warped = image.copy()
    for channel in range(3):
        warped[(*box, channel)] = ndimage.map_coordinates(image[..., channel], origin, order=1, mode="nearest")
    return warped


def missing(image: Floats, donor: Floats, generator: Generator) -> Floats:
    """A missing part: a region in the colour of the image's rim, which often is the background."""
    rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    grain = 2 * generator.standard_normal((*image.shape[:2], 1), dtype=np.float32)
    return _blend(image, generator.choice(rim) + grain, _region(image, generator))


KINDS: tuple[Kind, ...] = (cut_paste, scar, scratch, crack, perlin_texture, stain, photometric, blur, noise, warp,
                           missing)


def _blend(image: Floats, content: Floats, alpha: Floats) -> Floats:
    return image + alpha[..., None] * (content - image)


def _side(image: Floats) -> int:
    """The shorter side, the unit of lengths: defects grow with the image."""
    return int(min(image.shape[:2]))


def _place(image: Floats, generator: Generator) -> tuple[int, int]:
    """A random (y, x), preferably on structure instead of a plain background."""
    reach = max(1, _side(image) // 32)
    places = generator.integers(image.shape[:2], size=(3, 2)).tolist()
    contrasts = [image[max(0, y - reach):y + reach, max(0, x - reach):x + reach].std() for y, x in places]
    y, x = places[int(np.argmax(contrasts))]
    return y, x


def _shift(generator: Generator) -> float:
    """A change of levels that is clearly lighter or darker."""
    return float(generator.choice([-1, 1]) * generator.uniform(40, 140))


def _colour(image: Floats, generator: Generator) -> Floats:
    """A random colour; grey for a grey image."""
    grey = np.ptp(image[::8, ::8], axis=-1).mean() < 4
    return generator.uniform(0, 255, 1 if grey else 3).astype(np.float32)


def _elsewhere(donor: Floats, generator: Generator) -> Floats:
    """The donor, shifted, mirrored, with another contrast and brightness."""
    shift = [int(generator.uniform(0.1, 0.9) * side) for side in donor.shape[:2]]
    moved = np.roll(donor, shift, (0, 1))[::generator.choice([-1, 1]), ::generator.choice([-1, 1])]
    return moved * generator.uniform(0.7, 1.3) + generator.uniform(-30, 30)


def _region(image: Floats, generator: Generator) -> Floats:
    return _rectangle(image, generator) if generator.random() < 0.3 else _blob(image, generator)


def _rectangle(image: Floats, generator: Generator, sides: tuple[float, float] | None = None) -> Floats:
    """A rectangle, rotated at random; sides relative to the image's."""
    along, across = _side(image) / 2 * np.array(sides or generator.uniform(0.04, 0.25, 2))
    angle, (y, x) = generator.uniform(0, math.pi), _place(image, generator)
    u, v = along * np.array([math.cos(angle), math.sin(angle)]), across * np.array([-math.sin(angle), math.cos(angle)])
    corners = np.array([x, y]) + np.stack([u + v, u - v, -u - v, v - u])
    return _drawn(image, lambda draw: draw.polygon(corners.ravel().tolist(), fill=255))


def _line(image: Floats, points: Floats, width: float) -> Floats:
    """A line through points (y, x); width relative to the image's side, at least a pixel."""
    flat, pixels = points[:, ::-1].ravel().tolist(), max(1, round(width * _side(image)))
    return _drawn(image, lambda draw: draw.line(flat, fill=255, width=pixels))


def _drawn(image: Floats, draw: Callable[[ImageDraw.ImageDraw], None]) -> Floats:
    canvas = Image.new("L", image.shape[1::-1])
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), np.float32) / 255  # as soft as in a photograph


def _blob(image: Floats, generator: Generator, radii: tuple[float, float] = (0.03, 0.14),
          softness: float | None = None) -> Floats:
    """An ellipse with an uneven rim; radii relative to the image's side, softness 0 (a hard rim) to 1."""
    (y, x), angle = _place(image, generator), generator.uniform(0, math.pi)
    down, right = (np.arange(side, dtype=np.float32) for side in image.shape[:2])
    down, right = (down - y)[:, None], right - x
    first, second = (_side(image) * generator.uniform(*radii, 2)).tolist()
    distance: Floats = np.hypot((right * math.cos(angle) + down * math.sin(angle)) / first,
                                (down * math.cos(angle) - right * math.sin(angle)) / second)
    distance += generator.uniform(0, 1) * _perlin(image, 8, generator)
    return np.asarray((1 - distance) / (softness or generator.uniform(0.1, 1))).clip(0, 1)


def _perlin(image: Floats, cells: int, generator: Generator) -> Floats:
    """Gradient noise (Perlin, SIGGRAPH 2002), about -0.7 to 0.7, from a lattice of cells x cells."""
    angles = generator.uniform(0, 2 * math.pi, (cells + 1, cells + 1)).astype(np.float32)

    def along(side: int) -> tuple[Floats, Floats]:
        """Distance of each pixel to each lattice line, in cells, and the line's weight: [side, cells + 1]."""
        distance = np.arange(side, dtype=np.float32)[:, None] * (cells / side) - np.arange(cells + 1, dtype=np.float32)
        near = (1 - np.abs(distance)).clip(0)
        return distance, near ** 3 * (near * (near * 6 - 15) + 10)

    (y, row), (x, column) = along(image.shape[0]), along(image.shape[1])
    return np.asarray((row * y) @ np.sin(angles) @ column.T + row @ np.cos(angles) @ (column * x).T)
