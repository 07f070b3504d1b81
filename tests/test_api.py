"""The Python API: ``uadtool.open_model``, ``uadtool.predict`` and ``uadtool.compare``."""

import json
import subprocess
import sys

import pytest
from records import lines, score_records

import uadtool


def test_predictions_of_paths(detector, mvtec, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    model = uadtool.open_model(detector, threads=1)
    json.dumps(model.path)
    (sample, error), *predictions = uadtool.predict(model, [tmp_path, mvtec])
    assert sample.path == str(tmp_path / "broken.png")
    assert isinstance(error, uadtool.UadtoolError)
    assert {(sample.class_name, sample.label) for sample, _ in predictions} == {
        (name, label) for name in model.metadata.classes for label in ("good", "anomalous")}
    for _, prediction in predictions:
        assert prediction.nearest_class in model.metadata.classes
        assert prediction.anomaly_map.shape == model.metadata.map_size
    sample, prediction = predictions[0]
    for path in (sample.path, mvtec / sample.path, [sample.path]):
        (again,) = uadtool.predict(model, path)
        assert again[1].score == prediction.score


def test_comparison_of_files(tmp_path):
    for name, noise in (("a", 0.0), ("b", 1.0)):
        (tmp_path / f"{name}.jsonl").write_text(lines(score_records(f"{name}.onnx", noise=noise)))
    record = json.loads(json.dumps(uadtool.compare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])))
    assert [model["label"] for model in record["models"]] == ["a.onnx", "b.onnx"]
    assert record["rows"][0]["changes"][1] < 0


def test_errors_are_those_of_the_command(tmp_path):
    with pytest.raises(uadtool.UadtoolError, match=r"missing\.onnx: no such model file"):
        uadtool.open_model(tmp_path / "missing.onnx")
    with pytest.raises(uadtool.UadtoolError, match=r"cannot read .*missing\.jsonl"):
        uadtool.compare([tmp_path / "missing.jsonl"])
    with pytest.raises(AttributeError, match="module 'uadtool' has no attribute 'train'"):
        uadtool.train  # noqa: B018
    assert {"open_model", "predict", "compare"} <= set(dir(uadtool))


def test_importing_the_package_imports_nothing_else():
    program = "import sys, uadtool; print([name for name in sys.modules if name.startswith(('uadtool', 'numpy'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['uadtool']\n"
