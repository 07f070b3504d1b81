import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "examples/results"


@pytest.mark.parametrize(("name", "sizes", "options", "rows"), [
    ("bank-sizes", "20,60", "--image-size 64", ["20", "60"]),
    ("input-sizes", "64,64x96", "--option entries=20", ["64x64", "64x96"]),
])
def test_it_prints_the_table_and_draws_the_figure(textures, preloaded, tmp_path, name, sizes, options, rows):
    path = os.pathsep.join([str(preloaded.parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, PROGRAMS / f"{name.replace('-', '_')}.py", textures, tmp_path / "out", "--sizes", sizes,
         "--seeds", "0", "--train", options], env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stderr
    head, _, *lines = done.stdout.splitlines()
    assert [cell.strip() for cell in head.split("|")[2:4]] == ["image AUROC", "pooled"]
    assert [line.split("|")[1].strip() for line in lines] == rows
    assert "<svg" in (tmp_path / f"out/{name}.svg").read_text()
