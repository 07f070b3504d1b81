"""examples/jetson/gpu_report.py and launches.py, as far as they go without a GPU.

The report runs with stand-ins for TensorRT and the driver in each of its processes; engines are ONNX files there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flavours import flavour
from stand_in_gpu import compile_driver

from uadtool.lab.onnx_export.writer import save_onnx
from uadtool.runtimes.contract import Output

EXAMPLE = Path(__file__).parents[2] / "examples/jetson"
STAND_INS = """
import os, sys
sys.path[:0] = {paths}
from stand_in_gpu import Gpu
from uadtool.tensorrt import driver
driver.LIBRARY = {library!r}
gpu = Gpu(driver.LIBRARY)
sys.modules["tensorrt"] = gpu.tensorrt()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH, with which every Python has the stand-ins."""
    folder = tmp_path_factory.mktemp("site")
    library = compile_driver(folder)
    paths = [str(EXAMPLE.parents[1]), str(Path(__file__).parents[1])]
    (folder / "sitecustomize.py").write_text(STAND_INS.format(paths=paths, library=library))
    return folder


@pytest.fixture(scope="module")
def models(make_detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_detector(folder / "one.onnx")
    make_detector(folder / "two.onnx")
    return folder


@pytest.fixture
def report(site, mvtec, tmp_path):
    """Write the report of models; gives the finished process, the record and the lines of the table."""
    def report(models, *options, paths=None):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, EXAMPLE / "gpu_report.py", *(paths or (models, mvtec, tmp_path / "out")),
                   "--duration", "0.05", "--max-batch", "4", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        written = tmp_path / "out" / "report.json"
        if not written.exists():
            return done, None, None
        lines = (tmp_path / "out" / "report.md").read_text().splitlines()
        return done, json.loads(written.read_text()), lines

    return report


def test_every_model_is_built_run_and_timed(report, models):
    done, record, lines = report(models, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert record["gpu"] == {"name": "Xavier", "compute_capability": "7.2", "multiprocessors": 6}
    assert set(record["models"]) == {"one", "two"}
    for found in record["models"].values():
        assert found["build"]["optimal_batch"] == 1
        scores = found["run"]["scores"]
        assert (scores["within"], scores["same_class"]) == (True, 1)
        assert scores["difference"] < 1e-5
        assert found["run"]["layers"] == {"int8": 1, "fp32": 1, "other": 2}
        assert set(found["run"]["latency"]) == {"1", "4"}
        for latency in found["run"]["latency"].values():
            assert set(latency) == {"graph", "plain"}
            assert all(0 < one["p50"] <= one["p90"] <= one["p99"] for one in latency.values())
        assert found["run"]["threads"]["same"]
        assert found["run"]["grown_bytes"] == 0
        assert found["run"]["slowest"][0] == ["convolution", 1.5]
        assert len(found["processes"]) == 2
    assert lines[0].startswith("Xavier, ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert cells[2][:3] == ["one", "8.5.2.2", "ok 0.0000"]
    assert cells[2][-1] == "2 other, 1 int8, 1 fp32"


def test_a_model_that_fails_is_a_line_and_the_others_go_on(report, models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    (folder / "broken.onnx").write_bytes(b"nonsense")
    done, record, lines = report(folder, "--only", "broken|one")
    assert done.returncode == 1
    assert "is damaged or not an ONNX file" in record["models"]["broken"]["build"]["error"]
    assert "Traceback" not in record["models"]["broken"]["build"]["error"]
    assert record["models"]["one"]["run"]["scores"]["within"]
    assert "two" not in record["models"]
    assert any(line.startswith("| broken |  | build: exit 1: error: ") for line in lines)


def test_scores_that_are_off_are_seen(report, models, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(models / "one.onnx", folder)
    done, *_ = report(folder)
    assert done.returncode == 0
    with np.load(folder / "one.npz") as content:
        values = dict(content)
    np.savez(folder / "one.npz", **{**values, "score": values["score"] + 10})
    done, record, lines = report(folder)
    assert done.returncode == 1
    assert not record["models"]["one"]["run"]["scores"]["within"]
    assert "| OFF " in lines[-1]
    np.savez(folder / "one.npz", **{name: value[:1] for name, value in values.items()})
    done, record, _ = report(folder)
    assert "is of other images; delete it" in record["models"]["one"]["run"]["error"]


def test_a_step_that_hangs_is_ended(report, models):
    done, record, _ = report(models, "--limit", "0.1", "--only", "one")
    assert done.returncode == 1
    assert record["models"]["one"]["build"]["error"] == "no answer within 0 s"
    done, record, _ = report(models, "--seconds", "0")
    assert [found["build"]["error"] for found in record["models"].values()] == ["no time was left"] * 2


def test_what_onnx_runtime_gives_is_written_beforehand(report, models, mvtec, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(models / "one.onnx", folder)
    done, *_ = report(folder, "--expect", paths=[folder, mvtec])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with np.load(folder / "one.npz") as content:
        assert set(content) == set(Output._fields)


@pytest.mark.parametrize(("paths", "message"), [
    (["nothing", "images", "out"], "error: no models; MODELS must have *.onnx files"),
    (["models", "images"], "takes MODELS IMAGES OUT, or --expect MODELS IMAGES"),
])
def test_wrong_usage_is_one_line(report, models, paths, message):
    done, *_ = report(models, paths=paths)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_launches_and_bytes_are_counted_without_a_gpu(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    for precision in ("fp16", "int8"):
        save_onnx(flavour("resnet18", "tensorrt", precision).proto, tmp_path / f"{precision}.onnx")
    done = subprocess.run([sys.executable, EXAMPLE / "launches.py", tmp_path / "fp16.onnx", tmp_path / "int8.onnx"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])})
    assert done.returncode == 0, done.stderr
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert header[:3] == ["model", "kernels", "MB"]
    for name, row in zip(("fp16", "int8"), rows):
        assert row[0] == name
        assert 40 <= int(row[1]) <= 120  # 30 convolutions and the score head
        weights = (tmp_path / f"{name}.onnx").stat().st_size / 1e6
        assert weights < float(row[2]) < 4 * weights  # at 64 px most of them are weights
        assert all(0 < float(part) < 3 for cell in row[3:] for part in cell.split(" / "))
