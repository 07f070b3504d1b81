"""Commands that are killed, stopped, or run out of space leave the old file or the new one, and can be resumed."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import pytest
import timm
import torch
from killing import Commands, Ended
from PIL import Image

from uadtool.files import WRITTEN, check_writable

TEACHER = "mobilenetv2_035"
CHAIN = ("train", "calibrate", "quantize", "export")

CHECK = 11
"""Number of changes by which a command finds out, before it starts, that it can write its output, and claims it."""


class Line(NamedTuple):
    """A command of the chain without its output; the name and the final content of the output; the seconds it takes."""

    words: List[object]
    output: str
    content: bytes
    seconds: float


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("streams")) as commands:
        yield commands


@pytest.fixture(scope="module")
def lines(commands, textures, tmp_path_factory) -> Dict[str, Line]:
    """The chain, with a tiny teacher."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    weights = folder / "teacher.pth"
    torch.save(timm.create_model(TEACHER).state_dict(), weights)
    model, ranges, int8 = (folder / name for name in ("m.safetensors", "r.json", "q.safetensors"))
    training = ["train", textures, "--method", "stfpm", "--teacher", TEACHER, "--teacher-weights", weights,
                "--image-size", 64]
    # Of a network that has learned nothing, int8 loses too much to be exported.
    assert commands.run(*training, "--steps", 30, "-o", model).code == 0
    lines = {}
    for output, *words in (
        (folder / "few.safetensors", *training, "--steps", 3),
        (ranges, "calibrate", model, textures, "--count", 8),
        (int8, "quantize", model, textures, "--ranges", ranges),
        (folder / "m.onnx", "export", int8),
    ):
        began = time.monotonic()
        ended = commands.run(*words, "-o", output)
        assert ended.code == 0, ended.stderr
        lines[words[0]] = Line(words, output.name, output.read_bytes(), time.monotonic() - began)
    return lines


@pytest.fixture
def crash(commands, lines, tmp_path):
    """Run a command of the chain over an old output until it is interrupted; ``at`` is the number of a change.

    However it ends, the output is the old or the new file, and the next run leaves only the new file.
    """
    def crash(name: str, at: Optional[int] = None, **between: Any) -> Ended:
        line, output = lines[name], tmp_path / lines[name].output
        output.write_bytes(b"old")
        if at:
            between["at"] = tmp_path, at
        ended = commands.run(*line.words, "-o", output, **between)
        assert output.read_bytes() in (b"old", line.content)
        again = commands.run(*line.words, "-o", output, *(["--resume"] if name == "train" else []))
        assert again.code == 0, again.stderr
        assert output.read_bytes() == line.content
        assert list(tmp_path.iterdir()) == [output]
        return ended

    return crash


# Killed


WRITE = """
import sys
from killing import signal_at
from uadtool.files import atomic_write
signal_at(sys.argv[1], int(sys.argv[2]))
with atomic_write(f"{sys.argv[1]}/file") as temporary:
    temporary.write_text("new")
"""


@pytest.fixture
def environment():
    """The environment of ``WRITE``, which imports from this folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}


def test_killed_at_each_step_of_writing_a_file(environment, tmp_path):
    path, states = tmp_path / "file", []
    for step in itertools.count(1):
        path.write_text("old")
        code = subprocess.call([sys.executable, "-c", WRITE, str(tmp_path), str(step)], env=environment)
        states.append((path.read_text(), len(list(tmp_path.iterdir()))))
        check_writable(path)  # as the next run does
        assert list(tmp_path.iterdir()) == [path]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert states == sorted(states, key=lambda state: state[0], reverse=True)  # never new and then old
    assert {("old", 1), ("old", 2), ("new", 1)} == set(states)


def test_a_file_that_another_process_is_writing_is_not_removed(environment, tmp_path):
    program = WRITE.replace('temporary.write_text("new")', "input(temporary)")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "1000"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=environment, text=True) as process:
        process.stdout.read(1)
        (part,) = tmp_path.iterdir()
        check_writable(tmp_path / "file")
        assert part.exists()
        process.kill()
        process.wait()
        check_writable(tmp_path / "other")
        assert part.exists()
        check_writable(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_killed_before_every_change(crash, name):
    codes = list(itertools.takewhile(bool, (crash(name, at=change).code for change in itertools.count(1))))
    print(f"{name}: killed before each of {len(codes)} changes")
    assert set(codes) == {-signal.SIGKILL}
    assert len(codes) >= CHECK + (24 if name == "train" else 5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("train", 20), ("calibrate", 15), ("quantize", 15), ("export", 10)])
def test_killed_at_random_moments(crash, lines, name, times):
    moments, killed, longest = random.Random(name), 0, 1.1 * lines[name].seconds
    for _ in range(times):
        if crash(name, after=moments.uniform(0, longest)).code == -signal.SIGKILL:
            killed += 1
        else:
            longest *= 0.8  # the machine may be faster now than when it was timed
    print(f"{name}: killed {killed} of {times} times")
    assert killed > times / 2


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_ends_as_if_it_was_not(commands, lines, tmp_path):
    line, output = lines["train"], tmp_path / "m.safetensors"
    kills = 0
    while True:
        ended = commands.run(*line.words, "-o", output, "--resume", at=(tmp_path, CHECK + 16))  # one or two checkpoints
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL
        assert not output.exists() or output.read_bytes() == line.content
        kills += 1
        assert kills < 10
    assert kills > 1
    assert output.read_bytes() == line.content
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture
def score_killed(commands, detector, mvtec, tmp_path):
    """Score with all outputs. All pictures and all lines except the last are whole; a second run completes them."""
    options = [word for name in ("heatmaps", "masks", "copy-anomalous")
               for word in (f"--{name}", tmp_path / name)]
    words = ["score", detector, mvtec, *options, "--contact-sheet", tmp_path / "sheet.png", "--threads", 1]

    def score_killed(**between: Any) -> Ended:
        ended = commands.run(*words, **between)
        for path in tmp_path.rglob("[!.]*.png"):
            with Image.open(path) as image:
                image.load()
        *whole, last = ended.stdout.split("\n")
        records = [json.loads(text) for text in whole]
        assert all(Path(record[key]).exists() for record in records for key in ("heatmap", "mask", "copy")
                   if key in record)
        assert last == "" or ended.code == -signal.SIGKILL
        again = commands.run(*words)
        assert again.code == 0, again.stderr
        assert [record.get("score") for record in map(json.loads, again.stdout.splitlines())][:len(records)] == [
            record.get("score") for record in records]
        assert [*tmp_path.rglob("*.uadtool-part")] == []
        return ended

    return score_killed


@pytest.mark.slow
@pytest.mark.parametrize("change", [3, 40, 150])
def test_scoring_that_is_killed_leaves_whole_pictures_and_whole_lines(score_killed, tmp_path, change):
    assert score_killed(at=(tmp_path, change)).code == -signal.SIGKILL


@pytest.mark.slow
def test_scoring_that_is_killed_at_random_moments(score_killed):
    moments = random.Random(0)
    killed = sum(score_killed(after=moments.uniform(0, 1)).code == -signal.SIGKILL for _ in range(40))
    print(f"score: killed {killed} of 40 times")
    assert killed > 12


# Stopped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_training_that_is_stopped_leaves_a_checkpoint(commands, lines, tmp_path, number):
    line, output = lines["train"], tmp_path / "m.safetensors"
    ended = commands.run(*line.words, "-o", output, at=(tmp_path, CHECK + 8), number=number)  # in the second step
    assert (ended.code, ended.stdout) == (128 + number, "")
    assert f"interrupted at step 2; --resume continues from {output}.checkpoint" in ended.stderr
    assert list(tmp_path.iterdir()) == [Path(f"{output}.checkpoint")]
    resumed = commands.run(*line.words, "-o", output, "--resume")
    assert "resuming at step 2 of 3" in resumed.stderr
    assert output.read_bytes() == line.content


@pytest.mark.slow
def test_a_run_that_ignores_a_checkpoint_says_so(commands, lines, tmp_path):
    line, output = lines["train"], tmp_path / "m.safetensors"
    assert commands.run(*line.words, "-o", output, at=(tmp_path, CHECK + 8)).code == -signal.SIGKILL
    ended = commands.run(*line.words, "-o", output)
    assert f"starting anew; with --resume the run would continue from {output}.checkpoint" in ended.stderr
    assert output.read_bytes() == line.content


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", ["calibrate", "quantize"])
def test_other_commands_that_are_stopped_leave_nothing(crash, name, number):
    assert crash(name, at=CHECK + 2, number=number).code == 128 + number


# Out of space


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_no_room_for_the_output(crash, name):
    ended = crash(name, limit=1000)
    assert (ended.code, ended.stdout) == (1, "")
    assert re.fullmatch(r"(uadtool: (?!error).*\n)*uadtool: error: cannot write .*: File too large\n", ended.stderr)


@pytest.mark.slow
def test_a_training_whose_model_finds_no_room_can_be_resumed(commands, lines, tmp_path):
    """The memory banks of duet are in the model, but not in the checkpoint, which is smaller."""
    words = [*lines["train"].words, "--method", "duet", "--option", "entries=4000", "--option", "width=8", "-o",
             tmp_path / "m"]
    ended = commands.run(*words, limit=600_000)
    assert ended.code == 1
    assert ended.stderr.endswith(f"uadtool: error: cannot write {tmp_path}/m: File too large\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.checkpoint"]
    resumed = commands.run(*words, "--resume")
    assert "resuming at step 3 of 3" in resumed.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--heatmaps", "--masks", "--copy-anomalous", "--contact-sheet"])
def test_no_room_for_pictures(commands, detector, mvtec, tmp_path, option):
    ended = commands.run("score", "-q", detector, mvtec, option, tmp_path / "out.png", limit=50, stdout="/dev/null")
    assert ended.code == 1
    assert re.fullmatch(f"uadtool: error: cannot write {tmp_path}/out.*: File too large\n", ended.stderr)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != WRITTEN] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "quantize", "score", "csv", "bench", "compare", "--help", "--version"])
def test_a_full_disk_behind_stdout(commands, lines, detector, mvtec, tmp_path, name):
    (tmp_path / "scores").write_text(commands.run("score", detector, mvtec).stdout)
    words = {"score": ["score", "-q", detector, mvtec], "csv": ["score", "-q", detector, mvtec, "--format", "csv"],
             "bench": ["bench", "-q", detector, "--repetitions", 1, "--duration", 0.1],
             "compare": ["compare", tmp_path / "scores"]}.get(name)
    if name in CHAIN:
        words = [*lines[name].words, "-o", tmp_path / "out"]
    ended = commands.run(*(words or [name]), stdout="/dev/full")
    assert (ended.code, ended.stderr) == (1, "uadtool: error: cannot write to stdout: No space left on device\n")
    assert name not in CHAIN or (tmp_path / "out").read_bytes() == lines[name].content


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-o", "--junit"])
def test_no_room_for_a_comparison(commands, detector, mvtec, tmp_path, option):
    (tmp_path / "scores").write_text(commands.run("score", detector, mvtec).stdout)
    ended = commands.run("compare", tmp_path / "scores", "--gate", "recall>=0", option, tmp_path / "out", limit=50)
    assert ended.code == 1
    assert ended.stderr == f"uadtool: error: cannot write {tmp_path}/out: File too large\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "scores"]
