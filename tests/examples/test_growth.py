import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples/results/growth.py"


def test_it_prints_both_tables(textures, preloaded, tmp_path):
    path = os.pathsep.join([str(preloaded.parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, PROGRAM, textures, tmp_path / "out", "--base", "dots", "--counts", "2,20", "--seeds", "0",
         "--train", "--image-size 64 --option entries=100 --false-positive-rate 0.4"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n\n")
    assert first.splitlines()[0].split("|")[2].strip() == "stripes"
    assert [line.split("|")[1].strip() for line in first.splitlines()[2:]] == ["2", "20"]
    assert second.splitlines()[2].startswith("| dots")
    assert second.splitlines()[2].split("|")[2].strip().startswith("0 of ")
