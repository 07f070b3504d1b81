"""The edge half as a device gets it: the wheel alone, on Python 3.8 where there is one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

REPOSITORY = Path(__file__).parent.parent


def _run(command: List[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in its source folder
    shutil.copytree(REPOSITORY / "uadtool", source / "uadtool", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)])
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def device(wheel: Path, python38: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a Python 3.8 environment that holds the edge half and ONNX Runtime 1.19."""
    environment = tmp_path_factory.mktemp("device") / "venv"
    _run([str(python38), "-m", "venv", str(environment)])
    _run([str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[onnxruntime]",
          "onnxruntime==1.19.*"])
    return environment / "bin"


def test_a_device_scores_benches_and_compares_without_the_lab_half(
        device: Path, detector: Path, mvtec: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    packages = _run([str(device / "python"), "-m", "pip", "list", "--format", "json"])
    names = {package["name"] for package in json.loads(packages)}
    assert not names & {"torch", "timm", "onnx", "safetensors"}

    def uadtool(*arguments: str) -> str:
        return _run([str(device / "uadtool"), *arguments], cwd=tmp_path, env=environment)

    scores = uadtool("score", str(detector), str(mvtec))
    records = [json.loads(line) for line in scores.splitlines()]
    assert records[0]["host"]["python"].startswith("3.8.")
    assert records[0]["runtime"]["version"].startswith("1.19.")
    assert records[-1]["errors"] == 0
    assert records[-1]["metrics"]["image_auroc"]["pooled"] > 0.5
    bench = uadtool("bench", str(detector), "--duration", "0.1", "--repetitions", "1")
    (tmp_path / "scores.jsonl").write_text(scores, encoding="utf-8")
    (tmp_path / "bench.json").write_text(bench, encoding="utf-8")
    table = uadtool("compare", "scores.jsonl", "bench.json")
    assert "image AUROC" in table


@pytest.mark.parametrize(("command", "output", "message"), [
    ("train", "m.safetensors", r"torch is not installed; pip install 'uadtool\[lab\]'"),
    ("export", "m.engine", "TensorRT is not installed; "),
])
def test_commands_name_the_package_that_a_device_lacks(
        device: Path, detector: Path, tmp_path: Path, command: str, output: str, message: str) -> None:
    done = subprocess.run([str(device / "uadtool"), command, str(detector), "-o", str(tmp_path / output)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert re.fullmatch(rf"uadtool: error: {message}.*\n", done.stderr)
