"""Class names from all that a folder may be called, through the whole chain."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch")

import timm
import torch
from conftest import run_here

from uadtool.runtimes.onnx_file import read_metadata

FOLDER = os.fsdecode(b"a, " + "Geha\u0308use".encode() + b" \xe4")
"""A comma, a space, a letter and its accent as a Mac stores them (NFD), and a byte that is not UTF-8."""
NAME = os.fsdecode(b"a, " + "Gehäuse".encode() + b" \xe4")
SHOWN = NAME.replace(os.fsdecode(b"\xe4"), r"\udce4")


def run(*arguments: object) -> "subprocess.CompletedProcess[bytes]":
    """Run a command whose stdout does not take the name."""
    return subprocess.run([sys.executable, "-m", "uadtool", *map(str, arguments)], capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})


@pytest.fixture(scope="module")
def parts(textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names") / "parts"
    for source, name in (("dots", FOLDER), ("stripes", "BOLT")):
        shutil.copytree(textures / source, root / name)
        for image in (*root.rglob("01*.png"), *root.rglob("test/*/00[2-9].png")):  # 10 to train on and 2 + 2 to test
            image.unlink()
    return root


@pytest.fixture(scope="module")
def chain(parts: Path) -> Path:
    """The folder of the files that the steps wrote, and of the scores of each model by runtime."""
    folder = parts.parent
    float_model, ranges, int8 = folder / "m.safetensors", folder / "r.json", folder / "int8.safetensors"
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "teacher.pth")
    trained = run("train", parts, "--image-size", 64, "--teacher", "test_resnet", "--teacher-weights",
                  folder / "teacher.pth", "--classes", f'"{NAME}", BOLT', "-o", float_model)
    assert trained.returncode == 0, trained.stderr
    assert set(json.loads(trained.stdout)["classes"]) == {"BOLT", NAME}
    run_here("calibrate", float_model, parts, "--classes", f'"{NAME}"', "--count", 8, "-o", ranges)
    run_here("quantize", float_model, parts, "--ranges", ranges, "-o", int8)
    run_here("export", int8, "--images", parts, "-o", folder / "int8.onnx")
    for model, runtime in ((float_model, "torch"), (folder / "int8.onnx", "onnxruntime")):
        (folder / f"{runtime}.jsonl").write_text(run_here("score", model, parts, "--runtime", runtime))
    return folder


def images(text: str) -> List[Dict[str, Any]]:
    return [record for record in map(json.loads, text.splitlines()) if record["type"] == "image"]


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_every_runtime_gives_the_class(chain: Path, parts: Path, name: str) -> None:
    found = images((chain / f"{name}.jsonl").read_text())
    assert {record["class"] for record in found} == {NAME, "BOLT"}
    assert NAME in {record["nearest_class"] for record in found}
    assert {Path(record["path"]).relative_to(parts).parts[0] for record in found} == {FOLDER, "BOLT"}


def test_the_exported_file_holds_the_class(chain: Path) -> None:
    assert read_metadata(str(chain / "int8.onnx")).classes == ["BOLT", NAME]


def test_scores_as_csv_have_the_bytes_of_names(chain: Path, parts: Path) -> None:
    done = run("score", chain / "int8.onnx", parts / FOLDER, "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode("utf-8", "surrogateescape"))))
    assert {row["class"] for row in rows} == {NAME}
    assert all(Path(row["path"]).exists() for row in rows)


@pytest.mark.parametrize("style", ["table", "markdown", "csv", "json", "html"])
def test_comparisons_show_the_class(chain: Path, style: str) -> None:
    output = chain / "comparison"
    run_here("compare", chain / "torch.jsonl", chain / "onnxruntime.jsonl", "--format", style, "-o", output)
    text = output.read_text(encoding="utf-8")
    if style == "json":
        assert f"image_auroc.{NAME}" in {row["metric"] for row in json.loads(text)["rows"]}
    else:
        assert SHOWN in text


def test_gates_take_the_class_as_it_is_typed(chain: Path) -> None:
    gates = [gate for name in (NAME, FOLDER) for gate in ("--gate", f"image_auroc.{name}>1")]
    done = run("compare", chain / "torch.jsonl", *gates, "--junit", chain / "gates.xml")
    assert done.returncode == 4
    assert SHOWN in done.stdout.decode("utf-8")
    assert done.stderr.count(b"gate failed") == 2
    suite, = ElementTree.parse(chain / "gates.xml").getroot()
    assert [case.get("name") for case in suite] == [
        f"image_auroc.{name}>1".replace(os.fsdecode(b"\xe4"), r"\udce4") for name in (NAME, FOLDER)]
