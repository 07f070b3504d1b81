import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples/results/bank_sizes.py"


def test_it_prints_the_table_and_draws_the_figure(textures, preloaded, tmp_path):
    path = os.pathsep.join([str(preloaded.parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, PROGRAM, textures, tmp_path / "out", "--sizes", "20,60", "--seeds", "0", "--train",
         "--image-size 64"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["entries", "image AUROC", "pooled"]
    assert [row.split("|")[1].strip() for row in rows] == ["20", "60"]
    assert "<svg" in (tmp_path / "out/bank-sizes.svg").read_text()
