import csv
import io
import json

import numpy as np
import pytest
from conftest import run_here, validate
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy.ndimage import label

from uadtool.data.images import ImageError
from uadtool.scoring.anomaly_maps import upsample
from uadtool.scoring.regions import FINEST, find_regions, regions_of

THRESHOLD = 3.0


def record(path, **changes):
    return {"path": str(path), "threshold": THRESHOLD, "anomalous": True, **changes}


def cells(*places, value=9.0, shape=(8, 8)):
    """A map that is zero but for these cells."""
    values = np.zeros(shape, np.float32)
    for row, column in places:
        values[row, column] = value
    return values


def test_a_region_at_the_size_of_the_map_is_exact():
    values = cells((2, 1), (2, 2), (3, 2), value=5.0)
    values[3, 2] = 8.0
    values[6, 6] = 7.0
    first, second = find_regions(values, THRESHOLD, (8, 8))
    assert first == ((1, 2, 2, 2), 3, 8.0, 6.0)
    assert second == ((6, 6, 1, 1), 1, 7.0, 7.0)


def test_pixels_that_touch_at_a_corner_are_one_region():
    region, = find_regions(cells((2, 2), (3, 3)), THRESHOLD, (8, 8))
    assert region.box == (2, 2, 2, 2)
    assert region.area == 2


maps = arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-4, 8))
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@given(maps, sizes)
def test_regions_cover_what_a_mask_shows(values, size):
    threshold = float(values.max()) - 1
    found = find_regions(values, threshold, size)
    assert found
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)
    framed = np.zeros(size, bool)
    for region in found:
        left, top, width, height = region.box
        assert 0 <= left < left + width <= size[1]
        assert 0 <= top < top + height <= size[0]
        assert 1 <= region.area <= width * height
        assert region.mean <= region.peak <= values.max()
        framed[top:top + height, left:left + width] = True
    if size[0] >= values.shape[0] and size[1] >= values.shape[1]:
        mask = upsample(values, size) > threshold
        assert framed[mask].all()
        if mask.any():
            names, count = label(mask, np.ones((3, 3)))
            assert sorted(region.area for region in found) == sorted(np.bincount(names.ravel())[1:])
            assert len(found) == count


def test_an_image_that_is_just_anomalous_has_a_region():
    """Enlarged, a single cell just above the threshold is below it everywhere."""
    values = cells((4, 4), value=THRESHOLD + 0.01)
    assert not (upsample(values, (16, 16)) > THRESHOLD).any()
    region, = find_regions(values, THRESHOLD, (16, 16))
    assert region.box == (8, 8, 2, 2)
    assert region.peak < THRESHOLD


@pytest.mark.parametrize("size", [(9000, 12_000), (40, 30_000), (3, 5)])
def test_images_of_any_size(size):
    region, = find_regions(cells((2, 4), (2, 5), (3, 4), (3, 5)), THRESHOLD, size)
    left, top, width, height = region.box
    # Half of the peak is reached where the bilinear ramp is half way, and 2/3 of it a twelfth of a cell earlier.
    step = [max(1, side / FINEST) + 1 for side in size]
    for start, length, side, places, slack in ((left, width, size[1], (4, 6), step[1]),
                                               (top, height, size[0], (2, 4), step[0])):
        if side > 8:
            assert start == pytest.approx(places[0] * side / 8, abs=0.25 * side / 8 + slack)
            assert start + length == pytest.approx(places[1] * side / 8, abs=0.25 * side / 8 + slack)
    assert region.area <= width * height


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_upright_as_a_person_sees_the_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (320, 160)).save(tmp_path / "a.jpg", exif=exif)
    found, = regions_of(record(tmp_path / "a.jpg"), cells((0, 7), value=1000.0))["regions"]
    width, height = (320, 160) if orientation < 5 else (160, 320)
    left, top, across, down = found["box"]
    assert top == 0
    assert left + across == width
    assert (across, down) == (pytest.approx(1.5 * width / 8, abs=2), pytest.approx(1.5 * height / 8, abs=2))


def test_only_anomalous_images_have_regions(tmp_path):
    assert regions_of(record("gone.png", anomalous=False), cells()) == {}
    with pytest.raises(ImageError):
        regions_of(record("gone.png"), cells((1, 1)))


def test_the_records_of_a_run(detector, mvtec, tmp_path):
    lines = [json.loads(line) for line in run_here(
        "score", "-q", detector, mvtec, "--regions", "--masks", tmp_path / "masks").splitlines()]
    images = lines[1:-1]
    assert {image["anomalous"] for image in images} == {True, False}
    for image in images:
        validate(image, "score")
        assert ("regions" in image) == image["anomalous"]
        if image["anomalous"]:
            mask = np.asarray(Image.open(image["mask"]))
            assert sum(region["area"] for region in image["regions"]) == mask.sum()
            left, top, width, height = image["regions"][0]["box"]
            assert mask[top:top + height, left:left + width].sum() >= image["regions"][0]["area"]
            assert image["regions"][0]["peak"] > image["threshold"]
    assert not any("regions" in json.loads(line) for line in run_here("score", "-q", detector, mvtec).splitlines())
    rows = list(csv.DictReader(io.StringIO(run_here("score", "-q", detector, mvtec, "--regions", "--format", "csv"))))
    assert [json.loads(row["regions"] or "null") for row in rows] == [image.get("regions") for image in images]
