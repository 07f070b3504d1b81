"""--image-size auto: the shape of the images, with a given number of pixels."""

import json

import numpy as np
import pytest
from conftest import run_here
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.dataset import training_samples
from uadtool.data.samples import Sample
from uadtool.data.sizing import LONGEST, MULTIPLE, size_of, suitable_size
from uadtool.errors import UadtoolError


@given(st.floats(0.02, 50), st.sampled_from([64, 256, 384, 1024]))
def test_a_size_has_the_shape_and_the_number_of_pixels(ratio, side):
    height, width = size_of(ratio, side)
    assert height % MULTIPLE == width % MULTIPLE == 0
    assert MULTIPLE <= min(height, width) <= max(height, width) <= LONGEST
    if min(side * ratio**0.5, side / ratio**0.5) >= 4 * MULTIPLE and max(height, width) < LONGEST:
        assert height / width == pytest.approx(ratio, rel=0.3)
        assert height * width == pytest.approx(side**2, rel=0.27)  # each side is off by an eighth at most


def test_square_images_keep_the_given_side():
    assert [size_of(1, side) for side in (64, 256, 384)] == [(64, 64), (256, 256), (384, 384)]


@pytest.fixture
def parts(tmp_path):
    """Wide images of one class, upright ones of another; one is turned by its EXIF orientation, and one is broken."""
    for name, size, count in (("wide", (120, 40), 6), ("upright", (50, 70), 3)):
        folder = tmp_path / "parts" / name / "train/good"
        folder.mkdir(parents=True)
        for number in range(count):
            random = np.random.default_rng(number)
            Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 120)).save(tmp_path / "parts/wide/train/good/turned.jpg", exif=exif)
    return tmp_path / "parts"


def test_the_median_shape_counts_and_other_classes_are_named(parts, caplog):
    (parts / "wide/train/good/broken.png").write_bytes(b"no image")
    assert suitable_size(training_samples(str(parts)), 256) == (160, 448)  # 148 x 443
    assert "images of upright have another shape than 160x448" in caplog.text
    assert "wide" not in caplog.text.replace("wider", "")


def test_images_that_cannot_be_read_show_no_size(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UadtoolError, match="no image can be read"):
        suitable_size([Sample(str(tmp_path / "x.png"), "a")], 256)


def test_train_takes_the_size_and_tells_what_a_cell_covers(parts, tmp_path, caplog):
    caplog.set_level("INFO")
    record = json.loads(run_here("train", parts, "-o", tmp_path / "m.safetensors", "--image-size", "auto:64",
                                 "--option", "entries=20"))
    assert record["image_size"] == [32, 96]
    height, width = 4, 12  # of the anomaly map
    assert record["map_cells"] == {"upright": [-(-70 // height), -(-50 // width)],
                                   "wide": [-(-40 // height), -(-120 // width)]}
    assert "a cell of the anomaly map covers 10x10 pixels of an image of wide" in caplog.text


@pytest.mark.parametrize("value", ["auto:100", "auto:64x64", "auto:8192", "automatic", "0", "64x64x64", ":64"])
def test_other_sizes_are_refused(uadtool, parts, tmp_path, value):
    done = uadtool("train", parts, "-o", tmp_path / "m.safetensors", "--image-size", value)
    assert done.returncode == 2
    assert "is not a size such as 256, 256x320, auto or auto:384" in done.stderr
