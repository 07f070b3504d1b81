"""Files that earlier versions wrote (tests/samples, by schema number) still do what they did."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_here, validate

from uadtool.host import adds_int8_exactly

SAMPLES = Path(__file__).parent / "samples"
VERSIONS = sorted(path.name for path in SAMPLES.iterdir() if path.name.isdigit())
assert VERSIONS


@pytest.fixture(params=VERSIONS)
def sample(request, tmp_path, monkeypatch):
    """A folder with the files of a version, where the commands run that wrote them."""
    shutil.copytree(SAMPLES / "parts", tmp_path / "parts")
    shutil.copytree(SAMPLES / request.param, tmp_path / request.param)
    monkeypatch.chdir(tmp_path / request.param)
    return tmp_path / request.param


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def require_scores(found, expected):
    images = [[line for line in lines(text) if line["type"] == "image"] for text in (found, expected)]
    for one, other in zip(*images, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.05)
        for name in other.keys() - {"score", "raw_score", "milliseconds"}:  # later versions may add others
            assert one[name] == other[name]


def test_records_have_their_schema(sample):
    for name in ("train", "calibrate", "quantize", "export", "bench", "compare", "ranges"):
        validate(json.loads((sample / f"{name}.json").read_text()), name)
    for line in lines((sample / "scores.jsonl").read_text()):
        validate(line, "score")


@pytest.mark.skipif(not adds_int8_exactly(), reason="layers of old files share zero points, so int8 is inexact here")
def test_an_exported_model_scores_as_it_did(sample):
    require_scores(run_here("score", "int8.onnx", "../parts"), (sample / "scores.jsonl").read_text())


def test_a_quantized_model_is_exported_as_it_was(sample):
    run_here("export", "int8.safetensors", "-o", "again.onnx")
    require_scores(run_here("score", "again.onnx", "../parts"), (sample / "scores.jsonl").read_text())


def test_ranges_quantize_their_model_as_they_did(sample):
    run_here("quantize", "model.safetensors", "--ranges", "ranges.json", "-o", "again.safetensors")
    run_here("export", "again.safetensors", "-o", "again.onnx")
    require_scores(run_here("score", "again.onnx", "../parts"), (sample / "scores.jsonl").read_text())


def test_results_are_compared_as_they_were(sample):
    command = [sys.executable, "-m", "uadtool", "compare", "scores.jsonl", "bench.json", "--format", "json"]
    record = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    expected = json.loads((sample / "compare.json").read_text())
    for one, other in zip(record["models"], expected["models"], strict=True):
        assert {**one, **other} == one
    found = {row["metric"]: row["values"] for row in record["rows"]}
    for row in expected["rows"]:  # later versions may add others
        assert found[row["metric"]] == pytest.approx(row["values"]), row["metric"]
