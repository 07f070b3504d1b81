"""A method that another package adds: examples/plug-in, installed, through the whole chain."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import run_here

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.registry import find_method, method_options

PLUG_IN = Path(__file__).parents[2] / "examples/plug-in"


def test_the_chain(textures, tmp_path, monkeypatch):
    shutil.copytree(PLUG_IN, tmp_path / "plug-in")  # a build leaves files in its source folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
               tmp_path / "site", tmp_path / "plug-in"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(tmp_path / "site")
    model, ranges, int8 = (tmp_path / name for name in ("m.safetensors", "r.json", "int8.safetensors"))
    run_here("train", textures, "--method", "gaussian", "--option", "least=0.01", "--image-size", 64, "-o", model)
    run_here("calibrate", model, textures, "--count", 16, "-o", ranges)
    run_here("quantize", model, textures, "--ranges", ranges, "-o", int8)
    run_here("export", int8, "-o", tmp_path / "int8.onnx")
    last = json.loads(run_here("score", tmp_path / "int8.onnx", textures).splitlines()[-1])
    assert last["type"] == "summary"
    assert last["metrics"]["image_auroc"]["pooled"] > 0.9


class Point(metadata.EntryPoint):
    """An entry point of a package that is not installed."""


@pytest.fixture
def points(monkeypatch):
    def set_points(*found):
        monkeypatch.setattr("uadtool.lab.detectors.registry.entry_points", lambda group: [
            Point(name, value, group) for name, value in found])

    return set_points


def test_unknown_methods_are_refused_with_a_list_of_methods(points):
    points(("gaussian", "gaussian:Gaussian"))
    known = "stfpm, rd, us, dinomaly, memory, duet, gaussian"
    with pytest.raises(UadtoolError, match=f"unknown method 'x'; take one of {known}"):
        find_method("x")


def test_a_broken_plug_in_is_named(points):
    points(("broken", "no_such_module_at_all:Detector"))
    with pytest.raises(UadtoolError, match="method 'broken' cannot be loaded from no_such_module_at_all:Detector"):
        find_method("broken")


def test_a_built_in_method_cannot_be_replaced(points):
    points(("stfpm", "no_such_module_at_all:Detector"))
    assert find_method("stfpm").__name__ == "STFPM"


def test_options_have_the_types_of_their_defaults():
    assert method_options("stfpm", {}) == {"fusion": "sum", "dcam": False, "shared_stages": 0}
    options = method_options("duet", {"entries": "12"})
    assert options == {"entries": 12, "components": 112, "width": 96}


@pytest.mark.parametrize(("given", "message"), [
    ({"fusions": "sum"}, "stfpm has no option 'fusions'; it has fusion, dcam, shared_stages"),
    ({"entries": "many"}, "option entries of duet must be of type int, not 'many'"),
    ({"width": "inf"}, "option width of us must be finite, not inf"),
    ({"width": "nan"}, "option width of us must be finite, not nan"),
])
def test_wrong_options_are_refused(given, message):
    method = {"fusions": "stfpm", "entries": "duet", "width": "us"}
    with pytest.raises(UadtoolError, match=message):
        method_options(method[next(iter(given))], given)
