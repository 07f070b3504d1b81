"""Many processes on one model file; many images in one process."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import Step

from uadtool.data.dataset import scoring_samples

pytestmark = pytest.mark.slow

PROCESSES = 16


def start(model: Path, *paths: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "uadtool", "score", "-q", "--threads", "1", str(model), *map(str, paths)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def scores(printed: str) -> dict:
    records = map(json.loads, printed.splitlines())
    return {record["path"]: record["score"] for record in records if record["type"] == "image"}


def test_processes_on_one_model_file(fp32: Step, textures: Path) -> None:
    """All processes are alive at once, and each gives the scores of a single process."""
    alone, _ = start(fp32.path, textures).communicate()
    processes = [start(fp32.path, Path("-")) for _ in range(PROCESSES)]
    assert all(json.loads(process.stdout.readline())["type"] == "run" for process in processes)
    paths = "".join(f"{sample.path}\n" for sample in scoring_samples([str(textures)]))
    told = [process.communicate(paths) for process in processes]
    assert [process.returncode for process in processes] == PROCESSES * [0]
    for printed, said in told:
        assert [line for line in said.splitlines() if "look like no class" not in line] == []
        assert scores(printed) == pytest.approx(scores(alone), abs=1e-4)


def test_memory_stays(detector: Path, mvtec: Path) -> None:
    """The memory of a process that scores 20,000 images."""
    path = next(mvtec.glob("*/test/good/*"))
    process = start(detector, Path("-"))
    feeding = threading.Thread(target=lambda: (process.stdin.writelines(20_000 * [f"{path}\n"]), process.stdin.close()))
    feeding.start()
    resident = {}
    for number, _ in enumerate(process.stdout):
        if number in (1000, 20_000):
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident[number] = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    feeding.join()
    assert process.wait() == 0
    assert resident[20_000] - resident[1000] < 20
