import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import run_after

import uadtool as package
from uadtool.cli.main import COMMANDS, cli

PROGRAM = [sys.executable, "-m", "uadtool"]
HEAVY = ("torch", "timm", "onnx", "onnxruntime", "openvino", "numpy", "PIL", "scipy", "sklearn",
         "uadtool.scoring.heatmaps")


def python(program, *arguments, **options):
    """Run a Python program in its own process."""
    return subprocess.run([sys.executable, *program, *map(str, arguments)], capture_output=True, text=True, timeout=60,
                          check=False, **options)


# Help


def test_version(uadtool):
    done = uadtool("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"uadtool {package.__version__}\n", "")


def test_help_lists_the_commands_in_the_order_of_the_chain(uadtool):
    done = uadtool("--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = done.stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+) ", listed, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(uadtool, name):
    done = uadtool(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^  Examples?:\n    uadtool {name} ", done.stdout, re.MULTILINE)
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    command = cli.get_command(click.Context(cli), name)
    assert [option for option in command.params if isinstance(option, click.Option) and not option.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_can_be_parsed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = cli.get_command(click.Context(cli), name)
    examples = command.help.partition("Example")[2].replace("\\\n", " ")
    lines = re.findall(rf"uadtool {name} (.*)", examples)
    assert lines
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += ",:"
        words = list(itertools.takewhile(lambda word: word not in ("|", ">"), lexer))
        for word in words:
            if Path(word).suffix in (".safetensors", ".onnx", ".pth", ".jsonl"):
                Path(word).touch()
        command.make_context(name, words)


@pytest.mark.skipif(not shutil.which("jq"), reason="no jq on this machine")
def test_examples_with_jq_run(detector, mvtec, tmp_path):
    shutil.copytree(mvtec / "red/test", tmp_path / "photos")
    shutil.copy(detector, tmp_path / "model.onnx")
    for name in ("fp32", "int8"):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            options = ["--threshold", "100"] if name == "fp32" else []
            subprocess.run([*PROGRAM, "score", "model.onnx", "photos", *options], cwd=tmp_path, stdout=file, check=True)
    found = {}
    for command in COMMANDS:
        examples = cli.get_command(click.Context(cli), command).help.partition("Example")[2]
        for line in re.findall(r"^ *(uadtool .*\| *jq .*)", examples, re.MULTILINE):
            words = line.replace("uadtool", f"'{sys.executable}' -m uadtool", 1)
            words = words.replace(" bench ", " bench --duration 0.05 --repetitions 1 ")
            done = subprocess.run(["bash", "-o", "pipefail", "-c", words], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
            assert done.stdout, line
            assert "null" not in done.stdout, line
            found.setdefault(command, []).append(done.stdout.splitlines())
    assert all((tmp_path / path).is_file() for path in found["score"][0] + found["compare"][0])
    assert found.keys() == {"score", "compare", "bench"}


def loaded(done):
    """The modules of ``HEAVY`` that the process of ``IMPORTS`` has loaded."""
    return set(done.stderr.splitlines()[-1].split()[1:])


IMPORTS = ["-c", f"""
import sys
from uadtool.cli.main import main
try:
    main()
finally:
    print("loaded", *set({HEAVY}) & set(sys.modules), file=sys.stderr)
"""]


@pytest.mark.parametrize("arguments", [
    ["--help"], ["--version"], [], ["invent"], *([name, "--help"] for name in COMMANDS),
    *([name, "--invent"] for name in COMMANDS), *([name] for name in COMMANDS if name != "score"),
])
def test_help_and_wrong_usage_load_nothing_heavy(arguments):
    done = python(IMPORTS, *arguments)
    assert done.returncode == (0 if arguments[-1:] in (["--help"], ["--version"]) else 2)
    assert loaded(done) == set()


def test_scoring_imports_only_what_it_needs(detector, mvtec):
    done = python(IMPORTS, "score", detector, mvtec / "red/test/good")
    assert done.returncode == 0
    assert loaded(done) == {"numpy", "PIL", "onnxruntime"}


# How it ends


@pytest.mark.parametrize(("arguments", "message"), [
    (["invent"], "No such command 'invent'"),
    (["train"], "Missing argument 'DATA'"),
    (["train", "data"], "Missing option '-o'"),
    (["train", "data", "-o", "m", "--epochs", "1", "--steps", "1"], "--epochs and --steps are mutually exclusive"),
    (["train", "data", "-o", "m", "--image-size", "100"], "multiples of 16"),
    (["train", "data", "-o", "m", "--image-size", "64x64x64"], "is not a size such as"),
    (["train", "data", "-o", "m", "--image-size", "big"], "is not a size such as"),
    (["train", "data", "-o", "m", "--held-out", "1"], "not in the range"),
    (["train", "data", "-o", "m", "--seed", "-1"], "not in the range"),
    (["train", "data", "-o", "m", "--teacher-weights", "missing.pth"], "'missing.pth' does not exist"),
    (["train", "data", "-o", "m", "--target", "openvino"], "--target requires --teacher-int8"),
    (["train", "data", "-o", "m.onnx"], "train writes a .safetensors file; export makes m.onnx from it"),
    (["quantize", __file__, "-o", "m.engine", "--precision", "fp16"], "quantize writes a .safetensors file"),
    (["quantize", __file__, "d", "-o", "m", "--precision", "fp16", "--no-bias-correction"], "requires int8 and DATA"),
    (["calibrate", __file__, "-o", "r", "--source", "random-normal", "--classes", "a"], "--classes requires --source"),
    (["calibrate", __file__, "d", "-o", "r", "--percentile", "99.99"], "--percentile requires --method percentile"),
    (["calibrate", "missing.safetensors", "data", "-o", "r"], "'missing.safetensors' does not exist"),
    (["quantize", ".", "-o", "q"], "is a directory"),
    (["export", "missing.safetensors", "-o", "m"], "'missing.safetensors' does not exist"),
    (["score", "m", "--threshold", "1", "--false-positive-rate", "0.1", "x.png"], "leaves nothing to"),
    (["score", "m", "--fail-above", "1", "--fail-anomalous", "x.png"], "are mutually exclusive"),
    (["score", "m", "--heatmaps", "a", "--masks", "./a", "x.png"], "its own folder"),
    (["score", "m", "--follow", "a", "--batch-size", "2"], "one by one"),
    (["score", "m", "--follow", "a", "--masks", "a/masks"], "would be scored again"),
    (["score", "m", "--follow", "a", "b"], "--follow takes one folder"),
    (["score", "m", "--follow", "a", "--ray", "auto"], "--follow uses one process; leave out --shard and --ray"),
    (["score", "m", "x.png", "--ray", "auto", "--threads", "2"], "--ray uses one core per image; leave out --threads"),
    (["score", "m", "-0", "x.png"], "-0 requires paths on stdin"),
    (["score", "m", "x.png", "-"], "either PATHs or -"),
    (["score", "m", "--threshold", "nan", "x.png"], "not a finite number"),
    (["score", "m", "--top", "3", "x.png"], "--top requires --contact-sheet"),
])
def test_wrong_usage(uadtool, arguments, message):
    done = uadtool(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "missing", "-o", "m.safetensors"], "missing does not exist"),
    (["train", ".", "-o", f"{__file__}/m.safetensors"], f"cannot write {__file__}/m.safetensors: "),
    (["score", ".", "model.onnx"], ". is a folder, not a model; the model comes first"),
    (["export", __file__, "-o", "m.onnx"], "is not a safetensors file"),
    (["score", "missing.onnx", "."], "missing.onnx: no such model file"),
    (["compare", "missing.jsonl"], "missing.jsonl"),
])
def test_bad_input_is_reported_in_one_line(preloaded, tmp_path, arguments, message):
    done = subprocess.run([preloaded, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"uadtool: error: .*\n", done.stderr)
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_verbose_shows_where(uadtool):
    done = uadtool("compare", "-v", "missing.jsonl")
    assert done.returncode == 1
    assert done.stderr.startswith("uadtool: error: ")
    assert "Traceback (most recent call last)" in done.stderr
    assert 'uadtool/cli/compare.py", line' in done.stderr


BUG = """
from uadtool.comparing import comparison
def join(files):
    raise RuntimeError("first line\\nsecond line")
comparison.join = join
"""


def test_a_bug_is_also_reported_in_one_line():
    done = run_after(BUG, "compare", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "uadtool: error: RuntimeError: first line second line (-v shows where)\n"
    assert "Traceback" in run_after(BUG, "compare", "x", "-v").stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Makes environments for a Python without site-packages, with only the given modules."""
    def make(*modules):
        folder = tmp_path_factory.mktemp("site")
        for name in ("click", *modules):
            origin = Path(importlib.util.find_spec(name).origin).parent
            for path in (origin, origin.parent / f"{origin.name}.libs"):
                if path.exists():
                    (folder / path.name).symlink_to(path)
        (folder / "uadtool").symlink_to(Path(package.__file__).parent)
        return {**os.environ, "PYTHONPATH": str(folder)}

    return make


@pytest.mark.parametrize("name", ["train", "calibrate", "quantize", "export"])
def test_without_the_lab(bare, tmp_path, name):
    model = tmp_path / "model"
    model.write_text("")
    arguments = {"train": ["data"], "calibrate": [model, "data"], "quantize": [model, "--ranges", "r"],
                 "export": [model]}
    output = tmp_path / ("out.onnx" if name == "export" else "out")
    done = python(["-S", "-m", "uadtool"], name, *arguments[name], "-o", output, env=bare())
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == ("uadtool: error: torch is not installed; pip install 'uadtool[lab]' "
                           "(Python 3.10 or newer)\n")


def test_without_a_runtime(bare, detector):
    done = python(["-S", "-m", "uadtool"], "score", detector, "x.png", env=bare("numpy", "PIL"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "uadtool: error: onnxruntime is not installed; pip install 'uadtool[onnxruntime]'\n"


def test_help_needs_only_click(bare):
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
        done = python(["-S", "-m", "uadtool"], *arguments, env=bare())
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_waiting(detector, number):
    with subprocess.Popen([*PROGRAM, "score", str(detector)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(30) == 128 + number


def test_nohup(detector, mvtec):
    with subprocess.Popen(["nohup", *PROGRAM, "score", str(detector)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        answers, _ = process.communicate(os.fsencode(f"{mvtec}/red/test/good/000.png\n"), timeout=60)
        assert answers.count(b"\n") == 2
        assert process.returncode == 0


@pytest.mark.parametrize(("line", "code"), [
    ("score -q {detector} <&-", 1), ("score -q {detector} <&- 2>&-", 1), ("--version >&-", 0), ("train 2>&-", 2),
    ("compare {scores} -o out <&- >&- 2>&-", 0),
])
def test_streams_that_are_closed(uadtool, detector, mvtec, tmp_path, line, code):
    scores = tmp_path / "scores"
    scores.write_text(uadtool("score", detector, mvtec).stdout)
    words = line.format(detector=detector, scores=scores)
    done = subprocess.run(f"{shlex.join(PROGRAM)} {words}", shell=True, capture_output=True, text=True, cwd=tmp_path,
                          timeout=60)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 1 and done.stderr:
        assert done.stderr == "uadtool: error: no images to score\n"
    if "-o out" in line:
        assert (tmp_path / "out").read_text() == uadtool("compare", scores).stdout


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["score", "--help"]])
def test_the_reader_of_help_went_away(options):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*PROGRAM, *options], stdout=writer, stderr=subprocess.PIPE, timeout=60,
                              check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# Completion


def test_completion_script(uadtool, monkeypatch):
    monkeypatch.setenv("_UADTOOL_COMPLETE", "bash_source")
    done = uadtool()
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete -o nosort -F _uadtool_completion uadtool" in done.stdout


@pytest.mark.parametrize(("words", "completed"), [
    ("uadtool ca", ["calibrate"]), ("uadtool train --hel", ["--held-out", "--help"]),
    ("uadtool train --target op", ["openvino"]),
])
def test_completion(uadtool, monkeypatch, words, completed):
    monkeypatch.setenv("_UADTOOL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert [line.partition(",")[2] for line in uadtool().stdout.splitlines()] == completed
