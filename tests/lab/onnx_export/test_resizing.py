"""A graph that takes a camera's pixels resizes them as Pillow does."""

import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import onnx
import pytest
import torch
from conftest import Step, run_here, validate
from flavours import SIZE, flavour, operators, session
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.images import read_image
from uadtool.errors import UadtoolError
from uadtool.lab.onnx_export.lint import lint
from uadtool.lab.onnx_export.parity import MOST_PIXELS, parity_images
from uadtool.lab.onnx_export.resizing import BLOCK, Resizing, ResizingDetector, bilinear_weights, check_resizing
from uadtool.lab.onnx_export.writer import to_onnx
from uadtool.metadata import Reading
from uadtool.runtimes.onnx_file import read_metadata

sides = st.integers(1, 300)


@settings(max_examples=60)
@given(st.tuples(sides, sides), st.tuples(st.integers(1, 100), st.integers(1, 100)), st.booleans())
def test_any_size_is_resized_as_by_pillow(before, after, smooth):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, *before, 3), np.uint8)
    if smooth:
        pixels = np.stack([np.asarray(Image.fromarray(image[:5, :5]).resize(before[::-1])) for image in pixels])
    resized = Resizing(before, after)(torch.from_numpy(pixels.copy())).numpy()
    assert resized.shape == (2, *after, 3)
    expected = np.stack([np.asarray(Image.fromarray(image).resize(after[::-1], Image.Resampling.BILINEAR))
                         for image in pixels])
    assert np.abs(resized - expected).max() <= 1


def test_nearly_all_pixels_of_a_camera_are_the_same():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1080, 1920, 3), np.uint8)
    resized = Resizing((1080, 1920), (256, 256))(torch.from_numpy(pixels)).numpy()[0]
    expected = Image.fromarray(pixels[0]).resize((256, 256), Image.Resampling.BILINEAR)
    assert (resized != np.asarray(expected)).mean() < 0.001


def test_weights_add_up_to_one_and_are_local():
    weights = bilinear_weights(1920, 256)
    assert weights.sum(1) == pytest.approx(1)
    assert (weights > 0).sum(1).max() <= 2 * 1920 / 256 + 1
    assert Resizing((1080, 1920), (256, 256)).macs < 0.2 * (1080 * 3 * 1920 * 3 * 256 + 256 * 1080 * 3 * 256)
    assert np.array_equal(bilinear_weights(7, 7), np.eye(7))


def test_a_difference_from_pillow_is_an_error():
    resizing = Resizing((90, 140), (64, 64))
    pixels = np.zeros((1, 90, 140, 3), np.uint8)
    assert check_resizing(resizing, pixels) <= 1
    start, weights = resizing._rows[-1]
    resizing._rows[-1] = start, 0.98 * weights
    with pytest.raises(UadtoolError, match=r"resizes images by up to [2-9] grey levels unlike Pillow; nothing was"):
        check_resizing(resizing, pixels)


def test_few_images_are_compared_where_they_are_large():
    assert len(parity_images(None, Reading((64, 64)))) == 16
    assert len(parity_images(None, Reading((1080, 1920)))) == 4
    assert len(parity_images(None, Reading((4096, 2048)))) == 2
    assert MOST_PIXELS == 4096 * 2048


@pytest.mark.parametrize(("target", "precision"), [("tensorrt", "int8"), ("onnxruntime", "int8")])
def test_quantized_graphs_resize_in_float(target, precision):
    made = flavour("resnet18", target, precision)
    before = (90, 3 * BLOCK + 5)
    model = ResizingDetector(made.model, before, SIZE)
    proto = to_onnx(model, made.metadata.replace(image_size=before))
    assert lint(proto) == [] or target != "tensorrt"
    more = operators(proto) - operators(made.proto)
    assert set(more) == {"Reshape", "Slice", "MatMul", "Concat", "Add", "Floor"}
    images = np.random.default_rng(0).integers(0, 256, (3, *before, 3), np.uint8)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(SIZE[::-1], Image.Resampling.BILINEAR))
                        for image in images])
    score, = session(proto.SerializeToString()).run(["score"], {"image": images})
    expected, = session(made.proto.SerializeToString()).run(["score"], {"image": resized})
    assert score == pytest.approx(expected, abs=0.5)
    assert len(score) == 3


@pytest.fixture(scope="module")
def camera(step: Any, trained: Step, textures: Path) -> Step:
    return step("export", trained.path, "--input-size", "200x300", "--images", textures, output="camera.onnx")


@pytest.fixture(scope="module")
def frames(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the camera's size, and one of another size."""
    folder = tmp_path_factory.mktemp("frames")
    random = np.random.default_rng(0)
    for number, path in enumerate(sorted(textures.glob("*/test/*/00[0-3].png"))):
        with Image.open(path) as image:
            large = np.asarray(image.resize((300, 200), Image.Resampling.BICUBIC)).astype(int)
        noisy = (large + random.integers(-9, 10, large.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:02}.png")
    Image.fromarray(noisy).resize((500, 400)).save(folder / "other.png")
    return folder


def images(model: Path, folder: Path, *more: object) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in run_here("score", "-q", model, folder, *more).splitlines()][1:-1]


def test_the_camera_model_says_its_size(camera: Step, trained: Step):
    validate(camera.record, "export")
    assert camera.record["parity"]["pixel_difference"] in (0, 1)
    metadata = read_metadata(str(camera.path))
    assert metadata.image_size == (200, 300)
    assert metadata.provenance[-1]["resized_to"] == [64, 64]
    image, = onnx.load(camera.path).graph.input
    assert [size.dim_value for size in image.type.tensor_type.shape.dim[1:]] == [200, 300, 3]
    assert metadata.macs > 0


def test_scores_are_those_of_read_image(camera: Step, fp32: Step, frames: Path):
    found, expected = images(camera.path, frames), images(fp32.path, frames)
    assert len(found) == 17
    for one, other in zip(found, expected):
        assert one["nearest_class"] == other["nearest_class"]
        tolerance = 0.02 if not one["path"].endswith("other.png") else 0.5  # which is resized twice
        assert one["score"] == pytest.approx(other["score"], rel=0.01, abs=tolerance)
    assert images(camera.path, frames, "--batch-size", 5)[:16] != []
    pixels = np.stack([read_image(str(frames / "00.png"), size) for size in [(200, 300)] * 2])
    score, = session(str(camera.path)).run(["score"], {"image": pixels})
    assert score.tolist() == pytest.approx([found[0]["score"]] * 2, abs=1e-3)


@pytest.mark.parametrize(("arguments", "message"), [
    (["{onnx}", "-o", "m.engine", "--input-size", "200x300"], "--input-size requires an .onnx output."),
    (["{model}", "-o", "m.safetensors", "--input-size", "200x300"], "--input-size requires an .onnx output."),
    (["{model}", "-o", "m.onnx", "--input-size", "300"], "'300' is not HEIGHTxWIDTH in pixels, such as 1080x1920"),
    (["{model}", "-o", "m.onnx", "--input-size", "4097x300"], "(at most 4096)"),
])
def test_sizes_that_cannot_be(uadtool, trained, fp32, tmp_path, arguments, message):
    done = uadtool("export", *(argument.format(model=trained.path, onnx=fp32.path) for argument in arguments))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
