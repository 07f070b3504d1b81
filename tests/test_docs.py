"""Every command line in every README of the repository runs, on a data set small enough for a test.

README.md is a tour that makes models and scores; all others start from these. A command that cannot run here is
replaced by its dry run, which still fails on a wrong name: `make` by `make -n` in the repository (CI runs `make test`
and `make demo` themselves) and `pip install` by `pip install --dry-run`. Trainings have two steps of small images, and
measurements one short round. Engines are built for a named GPU, one process trains instead of two, memory is watched
over 100 images, not 20,000, the bucket is the local folder, and the Ray cluster one that Ray starts for the command.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import click
import pytest
import timm
import torch
from PIL import Image

from uadtool.cli.main import COMMANDS, cli

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
READMES = [README, *sorted(path for room in ("examples", "tests", "uadtool")
                           for path in (REPOSITORY / room).rglob("README.md"))]
MOST_LINES, MOST_BYTES = 180, 14_000
REPLACEMENTS: List[Tuple[str, str]] = [
    (r"^make (?=-[fC])", "make -n "),
    (r"^make (?!-)", f"make -n -C {REPOSITORY} "),
    (r"^pip install (.*)", rf"{sys.executable} -m pip install --dry-run --no-deps --no-build-isolation -q \1"),
    (r"^pip wheel", f"{sys.executable} -m pip wheel --no-build-isolation -q"),
    (r"^torchrun --nproc-per-node 2 -m ", ""),
    (r"(uadtool train parts (?!.*--add-to).*?)(?: --image-size \d+|$)", r"\1 --image-size 64"),
    (r"--(?:steps|epochs) \d+", "--steps 2"),
    (r"^uadtool bench \S+", r"\g<0> --duration 0.1 --repetitions 1"),
    (r"^uadtool export .*\.engine.*", r"\g<0> --compute-capability 8.6"),
    (r">=-0\.\d+", ">=-1"),
    (r">=0\.\d+", ">=0"),
    (r"<=0\.\d+", "<=1"),
    (r"scoring_memory.py unified-int8.onnx 20000", "scoring_memory.py unified-int8.onnx 100"),
    (r"(startup.py .*)", r"\1 1"),
    (r"s3://line-3/", ""),
    (r"--ray HEAD:6379", "--ray local"),
    (r"^bash (examples/jetson/soak.sh) .* >", r"bash -n \1 >"),
]
"""Patterns in command lines, and what stands there in the test."""


def name_of(readme: Path) -> str:
    """The folder of a README, relative to the repository."""
    return str(readme.relative_to(REPOSITORY).parent)


def with_slow_examples(readme: Path) -> object:
    """A parameter of a test that runs commands. The examples have tests of their own among the fast ones."""
    return pytest.param(readme, marks=pytest.mark.slow if name_of(readme).startswith("examples") else ())


def blocks(readme: Path, language: str) -> List[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_commands(readme: Path, folder: Path, uadtool: Path) -> None:
    """Run the lines after `$ ` in console blocks; continued lines are joined."""
    path = os.pathsep.join([str(uadtool.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    lines = "".join(blocks(readme, "console")).replace("\\\n", " ").splitlines()
    for line in (line[2:] for line in lines if line.startswith("$ ")):
        command = line
        for pattern, replacement in REPLACEMENTS:
            command = re.sub(pattern, replacement, command)
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment,
                              capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"$ {line}\n{done.stderr}"


@pytest.fixture(scope="session")
def tour(preloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a newcomer who followed README.md."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("examples", "uadtool", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, folder / name)
    torch.save(timm.create_model("resnet18").state_dict(), folder / "resnet18.pth")
    run_commands(README, folder, preloaded)
    shutil.copytree(folder / "parts" / "grid" / "test" / "scratch", folder / "photos")
    with Image.open(next((folder / "parts/grid/train/good").iterdir())) as image:
        Image.new("L", image.size, 255).save(folder / "roi.png")
    return folder


@pytest.mark.parametrize("readme", [with_slow_examples(readme) for readme in READMES], ids=map(name_of, READMES))
def test_every_command_line_runs(readme: Path, tour: Path, preloaded: Path) -> None:
    if readme != README:
        run_commands(readme, tour, preloaded)
    for program in blocks(readme, "python"):
        done = subprocess.run([sys.executable, "-c", program], cwd=tour, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), program
        assert done.stdout


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_links_to_files_and_headings_are_not_broken(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)
    for target, heading in links + [(name, "") for name in re.findall(r"src(?:set)?=\"([^\"]+)\"", text)]:
        path = readme.parent / target if target else readme
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], heading


def test_named_tests_exist() -> None:
    """The table in tests/README.md selects tests by words of their names."""
    text = (REPOSITORY / "tests/README.md").read_text(encoding="utf-8")
    selected = re.findall(r"\]\((\S+\.py)\) `-k \"?([\w ]+)\"?`", text)
    assert selected
    for path, words in selected:
        names = re.findall(r"def (test_\w+)", (REPOSITORY / "tests" / path).read_text(encoding="utf-8"))
        assert all(any(word in name for name in names) for word in words.split(" or ")), (path, words)


def test_the_readme_leads_in() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.encode()) <= MOST_BYTES
    assert {"$ make demo\n", "$ make test\n"} <= set(blocks(README, "console"))
    for readme in READMES:
        if len(readme.relative_to(REPOSITORY).parts) > 2 and readme.parent.parent != REPOSITORY / "examples":
            assert f"({readme.relative_to(REPOSITORY)})" in text, "a page that README.md does not lead to"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    text = "\n".join(readme.read_text(encoding="utf-8") for readme in READMES)
    command = cli.get_command(click.Context(cli), name)
    assert command
    assert f"$ uadtool {name} " in text
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            names = [*parameter.opts, *parameter.secondary_opts]
            assert any(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in names), names
