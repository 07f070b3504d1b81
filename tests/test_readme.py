"""Every command line of the READMEs runs, in its order, on a data set small enough for a test.

What cannot run as it stands is replaced by its dry run, which still fails on a wrong name: `make` by `make -n` in the
repository (CI runs `make test` and `make demo` themselves) and `pip install` by `pip install --dry-run`. Engines are
built for a GPU that is named, as there may be none; memory is watched over 100 images, not 20,000; the bucket is the
folder here, and the cluster one that Ray starts for the command.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import numpy as np
import pytest
import timm
import torch
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "examples/results/README.md"


def command_lines(text: str) -> List[str]:
    """The lines after `$ ` in console blocks, continued lines joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    joined = [block.replace("\\\n", " ") for block in blocks]
    return [line[2:] for block in joined for line in block.splitlines() if line.startswith("$ ")]


def in_test(line: str) -> str:
    line = re.sub(r"^make (?=-[fC])", "make -n ", line)
    line = re.sub(r"^make (?!-)", f"make -n -C {REPOSITORY} ", line)
    line = re.sub(r"^uadtool export .*\.engine.*", r"\g<0> --compute-capability 8.6", line)
    line = line.replace("scoring_memory.py unified-int8.onnx 20000", "scoring_memory.py unified-int8.onnx 100")
    line = line.replace("s3://line-3/", "").replace("--ray HEAD:6379", "--ray local")
    line = line.replace("pip wheel", f"{sys.executable} -m pip wheel -q")
    return re.sub(r"^pip install (.*)", rf"{sys.executable} -m pip install --dry-run --no-deps -q \1", line)


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A folder with what the README's commands expect beside them."""
    rng = np.random.default_rng(0)
    for kind, colour in (("bottle", (60, 120, 60)), ("cable", (120, 60, 60))):
        for place, count in (("train/good", 12), ("test/good", 4), ("test/scratch", 4)):
            folder = tmp_path / "parts" / kind / place
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 8, (96, 96, 3)), 0, 255).astype(np.uint8)
                if place == "test/scratch":
                    pixels[40:48, 20:76] = 255
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    (tmp_path / "photos").mkdir()
    for index in range(2):
        shutil.copy(tmp_path / "parts" / "bottle" / "test" / "scratch" / f"00{index}.png", tmp_path / "photos")
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    for name in ("examples", "uadtool", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def test_the_readme_has_its_two_commands_and_a_tour() -> None:
    lines = command_lines(README)
    assert {"make demo", "make test"} <= set(lines)
    for name in ("train", "calibrate", "quantize", "export", "score", "bench", "compare"):
        assert any(re.search(rf"\buadtool {name}\b", line) for line in lines), name


def test_every_command_line_of_the_readme_runs(newcomer: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in command_lines(README) + command_lines(RESULTS.read_text(encoding="utf-8")):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", in_test(line)], cwd=newcomer, env=environment,
                              capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"$ {line}\n{done.stderr}"
    programs = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert programs
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], cwd=newcomer, capture_output=True, text=True,
                              check=False)
        assert (done.returncode, done.stderr) == (0, ""), program
        assert done.stdout


def test_links_to_files_are_not_broken() -> None:
    for path in (REPOSITORY / "README.md", RESULTS):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r"src(?:set)?=\"([^\"]+)\"", text):
            assert (path.parent / target).exists(), target
