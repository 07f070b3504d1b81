from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.data.images import read_image
from uadtool.lab.training.synthetic import KINDS, LEAST_AREA, LEAST_CHANGE, synthetic_anomaly


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A bright disc on a dark background, both a little rough."""
    y, x = np.mgrid[:size[0], :size[1]]
    disc = np.hypot(y - size[0] / 2, x - size[1] / 2) < min(size) / 3
    colours = np.where(disc[..., None], (200, 160, 90), (30, 35, 40))
    return (colours + np.random.default_rng(seed).integers(-8, 9, (*size, 3))).astype(np.uint8)


@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(8, 70), st.integers(8, 70)), st.integers(0, 2),
       st.sampled_from(["picture", 0, 128, 255]))
def test_the_mask_is_where_pixels_changed_and_never_empty(seed, size, donors, content):
    image = picture(seed, size) if content == "picture" else np.full((*size, 3), content, np.uint8)
    before = image.copy()
    anomalous, mask = synthetic_anomaly(image, [picture(n, size) for n in range(donors)], np.random.default_rng(seed))
    assert (anomalous.dtype, anomalous.shape) == (np.uint8, image.shape)
    assert (mask.dtype, mask.shape) == (bool, image.shape[:2])
    change = np.abs(anomalous.astype(int) - image).max(-1)
    assert np.array_equal(mask, change > 0)
    assert mask.mean() >= LEAST_AREA
    assert change[mask].min() >= LEAST_CHANGE
    assert np.array_equal(image, before)


def test_the_generator_decides_everything():
    image, others = picture(), [picture(1), picture(2)]
    one, again, other = (synthetic_anomaly(image, others, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(map(np.array_equal, one, again))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_local_and_varied(kind):
    """Each kind usually changes something, never most of the image, and varies the place."""
    image, donor = picture(0).astype(np.float32), picture(1).astype(np.float32)[::-1]
    generator = np.random.default_rng(0)
    results = [kind(image, donor, generator) for _ in range(40)]
    assert {(result.dtype, result.shape) for result in results} == {(np.dtype(np.float32), image.shape)}
    masks = np.array([np.abs(result.clip(0, 255) - image).max(-1) >= LEAST_CHANGE for result in results])
    areas = masks.mean((1, 2))
    assert (areas > 0).mean() > 0.5
    assert 0.0005 < np.median(areas) < 0.15
    assert areas.max() < 0.4
    assert masks.any(0).mean() > 2 * areas.max()


def test_kinds_do_not_change_their_input():
    image, donor = picture(0).astype(np.float32), picture(1).astype(np.float32)
    for kind in KINDS:
        kind(image, donor, np.random.default_rng(0))
    assert np.array_equal(image, picture(0))
    assert np.array_equal(donor, picture(1))


def test_parts_of_other_images_appear():
    """A dark image has no green itself; it comes from green donors."""
    image, green = np.full((64, 64, 3), 5, np.uint8), np.full((64, 64, 3), (10, 240, 10), np.uint8)

    def greens(others):
        results = [synthetic_anomaly(image, others, np.random.default_rng(seed))[0].astype(int) for seed in range(60)]
        return sum((result[..., 1] - result[..., 0] > 100).any() for result in results)

    assert greens([green]) > greens([image]) == 0


def test_defects_grow_with_the_image():
    def area(side):
        image, generator = picture(0, (side, side)), np.random.default_rng(0)
        return np.mean([synthetic_anomaly(image, [], generator)[1].mean() for _ in range(60)])

    assert area(128) == pytest.approx(area(64), rel=0.5)


def test_real_textures_get_small_defects(textures: Path):
    images = [read_image(str(path), (64, 64)) for path in sorted(textures.glob("*/train/good/*.png"))[:20:2]]
    generator = np.random.default_rng(0)
    areas = [synthetic_anomaly(image, images, generator)[1].mean() for image in images for _ in range(5)]
    assert 0.002 < np.median(areas) < 0.1
    assert max(areas) < 0.4
