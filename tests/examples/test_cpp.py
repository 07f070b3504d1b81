"""examples/cpp: its scores are those of Python. It is built where ONNX Runtime's headers are installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Step
from PIL import Image

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "examples/cpp/score.cpp"
HEADER = "onnxruntime_cxx_api.h"
PLACES = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include")
SIZE = (200, 300)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built with the library of the Python package."""
    onnxruntime = pytest.importorskip("onnxruntime")
    library = next(iter(sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))), None)
    headers = next((place for place in PLACES if Path(place, HEADER).exists()), None)
    compiler = shutil.which("c++")
    if not (library and headers and compiler):
        pytest.skip("no compiler, or no headers or library of ONNX Runtime on this machine")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    subprocess.run([compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, f"-I{headers}",
                    folder / "libonnxruntime.so.1", f"-Wl,-rpath,{folder}", "-o", folder / "score"], check=True)
    return folder / "score"


@pytest.fixture(scope="module")
def camera(step: Any, trained: Step, textures: Path) -> Path:
    made = step("export", trained.path, "--input-size", "200x300", "--images", textures, output="camera.onnx")
    assert isinstance(made, Step)
    return made.path


@pytest.fixture(scope="module")
def frames(textures: Path) -> bytes:
    pixels = []
    for path in sorted(textures.glob("*/test/*/00[0-3].png")):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.resize(SIZE[::-1], Image.Resampling.BICUBIC)))
    return np.stack(pixels).tobytes()


def test_the_scores_are_those_of_python(program: Path, camera: Path, frames: bytes) -> None:
    done = subprocess.run([program, camera], input=frames, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [line.split("\t") for line in done.stdout.decode().splitlines()]
    python = subprocess.run([sys.executable, "-m", "uadtool", "score", "-q", camera, "--frames", "--raw", "200x300"],
                            input=frames, capture_output=True, check=True)
    run, *images, _ = map(json.loads, python.stdout.splitlines())
    assert len(images) == 16
    assert [int(number) for number, _, _ in lines] == [image["frame"] for image in images]
    expected = [image["score"] for image in images]
    assert [float(score) for _, score, _ in lines] == pytest.approx(expected, rel=0, abs=1e-4)
    names = [run["model"]["classes"][int(index)] for _, _, index in lines]
    assert names == [image["nearest_class"] for image in images]


def test_bad_input_is_one_line(program: Path, camera: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(camera.read_bytes()[:1000])
    for arguments, frames, code, message in (
            ([camera], b"short", 1, b"score: error: the last frame has 5 of 180000 bytes\n"),
            ([tmp_path / "broken.onnx"], b"", 1, b"score: error: "), ([], b"", 2, b"usage: "), ([camera], b"", 0, b"")):
        done = subprocess.run([program, *arguments], input=frames, capture_output=True)
        assert done.returncode == code
        assert done.stderr.startswith(message)
        assert done.stderr.count(b"\n") == bool(message)
