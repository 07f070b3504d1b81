"""The largest input: 1,024 x 4,096 pixels, 64 times the usual number."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

MOST_GIGABYTES = 5.0
"""Of a process; training takes 4.0 and scoring 2.5."""


@pytest.mark.slow
def test_the_largest_input_takes_bounded_memory(tmp_path):
    folder = tmp_path / "parts/wide/train/good"
    folder.mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(80, 140, (512, 2048, 3), np.uint8)
        Image.fromarray(pixels).resize((4096, 1024)).save(folder / f"{number}.png")
    for line in (["train", tmp_path / "parts", "-o", tmp_path / "m.safetensors", "--image-size", "1024x4096"],
                 ["export", tmp_path / "m.safetensors", "-o", tmp_path / "m.onnx"],
                 ["score", tmp_path / "m.onnx", folder]):
        done = subprocess.run([sys.executable, "-m", "uadtool", *map(str, line)], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6 < MOST_GIGABYTES
