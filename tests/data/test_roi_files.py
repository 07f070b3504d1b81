"""Regions of interest in data sets: where they are found, and which cells of a map they mark."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import run_here, validate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.check import check
from uadtool.data.dataset import read_dataset, scoring_samples, training_samples
from uadtool.data.roi import LEAST_SHARE, OVERSAMPLED, read_rois, roi_files, with_roi
from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError

SIZE = (64, 96)
"""(height, width) of the images."""


@pytest.fixture
def parts(tmp_path):
    """Two classes; the left half of the images of ``screw`` is their region of interest."""
    for name in ("bolt", "screw"):
        for place in ("train/good", "test/good", "test/scratch"):
            folder = tmp_path / "parts" / name / place
            folder.mkdir(parents=True)
            for number in range(6):
                random = np.random.default_rng([number, *f"{name}/{place}".encode()])
                pixels = random.integers(0, 255, (*SIZE, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    half().save(tmp_path / "parts/screw/ROI.png")
    return tmp_path / "parts"


def half(size=SIZE):
    pixels = np.zeros(size, np.uint8)
    pixels[:, :size[1] // 2] = 255
    return Image.fromarray(pixels)


def marked(path, name="screw"):
    return read_rois([Sample("a.png", name, roi=str(path))], {name: [SIZE, (10, 10)]}, (8, 8))[name]


def test_the_image_of_a_class_folder_is_no_image_of_the_class(parts):
    samples = training_samples(str(parts))
    assert roi_files(samples) == {"screw": str(parts / "screw/ROI.png")}
    assert len(samples) == 12
    assert not read_dataset(str(parts)).unused
    tested = list(scoring_samples([str(parts)]))
    assert len(tested) == 24
    assert roi_files(tested) == roi_files(samples)
    assert roi_files(training_samples(str(parts / "screw"))) == roi_files(samples)


def test_one_region_for_all_classes_or_an_image_named_after_each(parts, tmp_path, caplog):
    samples, folder = training_samples(str(parts)), tmp_path / "rois"
    half().save(tmp_path / "all.png")
    assert roi_files(with_roi(samples, str(tmp_path / "all.png"))) == dict.fromkeys(
        ("bolt", "screw"), str(tmp_path / "all.png"))
    folder.mkdir()
    half().save(folder / "nut.png")
    with pytest.raises(UadtoolError, match=r"has no image of a region of interest; name each after a class, such as"):
        with_roi(samples, str(folder))
    half().save(folder / "bolt.png")
    caplog.set_level("INFO")
    assert roi_files(with_roi(samples, str(folder))) == {"bolt": str(folder / "bolt.png")}
    assert "no class has the name of these regions of interest: nut" in caplog.text


def test_a_class_is_found_however_a_file_system_spells_it(tmp_path):
    name = unicodedata.normalize("NFD", "Prüfling")
    half().save(tmp_path / f"{name}.png")
    samples = [Sample("a.png", "Prüfling", "good")]
    assert roi_files(with_roi(samples, str(tmp_path))) == {"Prüfling": str(tmp_path / f"{name}.png")}


@given(st.data())
def test_a_cell_counts_if_half_of_it_is_white(tmp_path_factory, data):
    cells = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    shares = np.array(data.draw(st.lists(st.integers(0, OVERSAMPLED), min_size=cells[0] * cells[1],
                                         max_size=cells[0] * cells[1]))).reshape(cells)
    columns = np.arange(cells[1] * OVERSAMPLED) % OVERSAMPLED
    pixels = (columns < np.repeat(np.repeat(shares, OVERSAMPLED, 0), OVERSAMPLED, 1)).astype(np.uint8) * 255
    expected = shares >= OVERSAMPLED / 2
    path = tmp_path_factory.mktemp("roi") / "roi.png"
    Image.fromarray(pixels).save(path)
    if expected.mean() >= LEAST_SHARE:
        found = read_rois([Sample("a.png", "a", roi=str(path))], {"a": [pixels.shape]}, cells)
        assert np.array_equal(found["a"], expected)


def test_it_is_seen_as_a_person_sees_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    half().save(tmp_path / "roi.png", exif=exif)
    assert marked(tmp_path / "roi.png").tolist() == [[False] * 4 + [True] * 4] * 8


@pytest.mark.parametrize(("image", "message"), [
    (half((96, 64)), r"has 64x96 pixels, as no image of screw has; draw the region of interest on one of"),
    (Image.new("L", SIZE[::-1]), "is black, so nothing of screw would count"),
    (half().crop((47, 0, 143, 64)), r"marks 0\.0% of an image of screw, less than 1%; cut the images out"),
], ids=["other size", "black", "tiny"])
def test_bad_regions(parts, tmp_path, image, message):
    path = parts / "screw/ROI.png"
    image.save(path)
    with pytest.raises(UadtoolError, match=message):
        marked(path)
    assert str(path) in check(str(parts), None, 0.2, 0.01, 1)["refusal"]
    with pytest.raises(UadtoolError, match=message):
        run_here("train", parts, "-o", tmp_path / "m.safetensors", "--image-size", 64)
    assert not (tmp_path / "m.safetensors").exists()


def test_an_image_that_cannot_be_read(parts):
    (parts / "screw/ROI.png").write_bytes(b"no image")
    with pytest.raises(UadtoolError, match="cannot read"):
        marked(parts / "screw/ROI.png")


def checked(parts, *options):
    record = json.loads(run_here("train", parts, "--check", *options))
    validate(record, "check")
    return record


def test_a_check_reports_the_share(parts, tmp_path):
    record = checked(parts)
    assert record["refusal"] is None
    assert record["classes"]["screw"]["roi"] == 0.5
    assert "roi" not in record["classes"]["bolt"]
    half().save(tmp_path / "all.png")
    assert checked(parts, "--roi", tmp_path / "all.png")["classes"]["bolt"]["roi"] == 0.5
