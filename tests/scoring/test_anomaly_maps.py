"""Anomaly maps in the size of an image, and what lies outside the region of interest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uadtool.scoring.anomaly_maps import OUTSIDE, inside_roi, upsample
from uadtool.scoring.drawing import overlay_map
from uadtool.scoring.pixel_metrics import PixelMetrics, count_pixels
from uadtool.scoring.regions import find_regions


def test_upsampling_aligns_pixel_centres():
    """As torch does with align_corners=False, and unlike Pillow's default."""
    values = np.array([[0, 1, 2, 3]], np.float32)
    assert upsample(values, (1, 8)).tolist() == [[0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]]
    assert upsample(values.T, (8, 2)).shape == (8, 2)


@given(st.integers(0, 1000), st.integers(2, 9), st.integers(2, 9), st.integers(1, 40), st.integers(1, 40))
def test_what_lies_outside_the_region_never_shows_inside(seed, height, width, down, across):
    random = np.random.default_rng(seed)
    values = random.normal(3, 2, (height, width)).astype(np.float32)
    values[random.random((height, width)) < 0.5] = OUTSIDE
    inside = inside_roi(values)
    enlarged = upsample(values, (down, across))
    shown = enlarged[inside_roi(enlarged)]
    if inside.any() and len(shown):
        assert values[inside].min() - 1e-4 <= shown.min() <= shown.max() <= values[inside].max() + 1e-4
    assert (enlarged[~inside_roi(enlarged)] == OUTSIDE).all()


def test_a_region_with_straight_sides_keeps_its_place():
    values = np.full((8, 8), 2, np.float32)
    values[:, 4:] = OUTSIDE
    assert np.array_equal(inside_roi(upsample(values, (64, 64))), np.arange(64) < 32 * np.ones((64, 1)))


@pytest.fixture
def scene():
    """A map whose right half is outside, and a mask: one defect inside, one half inside, one outside."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (40, 60)).astype(np.float32)
    mask = np.zeros((40, 60), bool)
    mask[4:10, 4:10] = mask[20:26, 26:34] = mask[30:36, 50:56] = True
    values[mask] += 2
    cut = values.copy()
    values[:, 30:] = OUTSIDE
    return values, mask, cut[:, :30], mask[:, :30]


def test_pixels_outside_the_region_do_not_count(scene):
    values, mask, inner, inner_mask = scene
    found, expected = PixelMetrics(), PixelMetrics()
    for metrics, one, truth in ((found, values, mask), (expected, inner, inner_mask)):
        metrics.add(count_pixels(one, truth))
        metrics.add(count_pixels(one, np.zeros_like(truth)))
    assert found.to_json() == expected.to_json()
    assert found.to_json()["regions"] == 2
    assert 0.5 < found.aupro() < found.auroc() < 1


def test_a_defect_outside_the_region_is_no_region(scene):
    values = scene[0]
    assert find_regions(values, 1.5, (40, 60))
    assert all(region.box[0] + region.box[2] <= 30 for region in find_regions(values, 1.5, (40, 60)))


def test_a_heatmap_is_dark_outside_the_region(scene):
    image = np.full((40, 60, 3), 200, np.uint8)
    overlay = overlay_map(image, scene[0], 100.0)
    assert (overlay[:, 33:] == 70).all()  # a line of two pixels may stand at the edge
    assert overlay[:, :28].mean() > 150
