"""The same seed, data and versions give the same bytes: of every method, of every file of the chain, in any process."""

import json
import os
import subprocess
import sys

import pytest

CHAIN = """
import json, sys
from conftest import run_here
for line in json.loads(sys.argv[1]):
    run_here(*line)
"""
METHODS = {
    "stfpm": [], "rd": ["--option", "width=1"], "us": [], "dinomaly": ["--option", "depth=2", "--option", "width=32"],
    "duet": ["--option", "small=50", "--option", "large=50"],
}


def chain(method, textures, folder, hash_seed):
    """Train, calibrate, quantize and export in a process of its own."""
    folder.mkdir()
    fp32, ranges, int8 = (folder / name for name in ("m.safetensors", "r.json", "q.safetensors"))
    lines = [
        ["train", textures, "-o", fp32, "--method", method, "--image-size", 64, "--steps", 3, *METHODS[method]],
        ["calibrate", fp32, textures, "-o", ranges, "--count", 8, "--source", "good", "--source",
         "synthetic-anomalies"],
        ["quantize", fp32, textures, "--ranges", ranges, "-o", int8, "--keep-float", "auto:1"],
        ["export", fp32, "-o", folder / "m.onnx"],
        ["export", int8, "-o", folder / "q.onnx"],
    ]
    words = json.dumps([[str(word) for word in line] for line in lines])
    # Sets of texts have another order for every hash seed.
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed),
                   "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}  # noqa: PTH120
    subprocess.run([sys.executable, "-c", CHAIN, words], check=True, env=environment, capture_output=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_files_are_the_same_in_every_process(method, textures, tmp_path):
    one, other = (chain(method, textures, tmp_path / str(seed), seed) for seed in (1, 2))
    assert sorted(one) == ["m.onnx", "m.safetensors", "q.onnx", "q.safetensors", "r.json"]
    assert [name for name in one if one[name] != other[name]] == []
