"""A tiny detector that honours the contract of an exported one, a tiny dataset for it, and a real chain of commands."""

import contextlib
import fcntl
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image, ImageDraw

import uadtool as uadtool_package
from uadtool.cli.main import cli
from uadtool.host import keep_freed_memory
from uadtool.metadata import KEY, Metadata
from uadtool.terminal import log

settings.register_profile("tests", deadline=None, derandomize=True)  # results depend neither on the clock nor on luck
settings.load_profile("tests")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads anything, nor does a command that it runs
os.environ["SOURCE_DATE_EPOCH"] = "1772000000"  # equal trainings make equal files
os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks gain nothing from more threads, and wait long for a busy core
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and their children ignore it
keep_freed_memory()  # a third of the time for computations in torch

METADATA = Metadata(
    method="brightness", teacher="none", classes=["green", "red"], image_size=(32, 32), map_size=(8, 8), threshold=3.0,
    false_positive_rate=0.05, parameters=6, macs=1024, good_scores={"": [index / 10 for index in range(-20, 20)]},
    target="onnxruntime", tool_version="0.1.0", class_distance_limit=5.0,
)
STATISTICS = {"green": (40.0, 20.0), "red": (40.0, 10.0)}
"""Mean and standard deviation of the brightness of good images: they are dark."""
SPREAD = 20.0
"""Unit of the distance between the colour of an image and that of its class."""
SCORE_TOLERANCE = {"fp32": {"rtol": 0, "atol": 1e-3}, "int8": {"rtol": 0.05, "atol": 0.25}}
"""Between torch and ONNX Runtime, by precision. Between two codes, one kernel rounds up and another down."""


LONGEST = ("test_docs.py", "test_wheel.py", "test_flavours.py")
"""Files with tests that take longest."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that the processes of this test run (pytest-xdist) share; see ``only_one``."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="uadtool-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["UADTOOL_TESTS"] = folder.name


def shared_folder() -> Path:
    return Path(os.environ["UADTOOL_TESTS"])


@contextlib.contextmanager
def only_one(name: str) -> Iterator[Path]:
    """A path in the shared folder that only one process at a time makes. What exists, another has made."""
    with (shared_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield shared_folder() / name


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Start the longest files first, so that no core waits for them in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Exempt what the tests imported from garbage collection: to walk it takes a tenth of the time of an export."""
    gc.freeze()


SCHEMAS = Path(uadtool_package.__file__).parent / "schemas"


def validate(record: Any, name: str) -> None:
    """Require that a record obeys ``uadtool/schemas/NAME.json``, or a definition in it (``NAME#/$defs/...``)."""
    pytest.importorskip("jsonschema")
    _validator(name).validate(record)


@lru_cache(maxsize=None)
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    file, separator, definition = name.partition("#")
    schemas = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    Draft202012Validator.check_schema(schemas[f"{file}.json"])
    registry = Registry().with_contents(schemas.items())
    return Draft202012Validator({"$ref": f"{file}.json{separator}{definition}"}, registry=registry)


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., Path]:
    """Write a detector whose map is the brightness of 4 x 4 pixels, in units of the class of the nearest colour."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, types = onnx.helper, onnx.numpy_helper, onnx.TensorProto

    def make(path: Path, metadata: Metadata = METADATA, batch: str = "N", divisor: float = 1.0) -> Path:
        height, width = METADATA.image_size
        means, stds = zip(*(STATISTICS[name] for name in METADATA.classes))
        constants = {
            "prototypes": np.array([[[0, 80, 0], [80, 0, 0]]], np.float32),
            "means": np.array(means, np.float32).reshape(-1, 1, 1),
            "stds": np.array(stds, np.float32).reshape(-1, 1, 1),
            "divisor": np.array(divisor, np.float32), "spread": np.array(SPREAD, np.float32),
            "one": np.array([1]), "two": np.array([2]), "four": np.array([4]), "flat": np.array([0, -1])}
        node = helper.make_node
        nodes = [
            node("Cast", ["image"], ["pixels"], to=types.FLOAT),
            node("ReduceMean", ["pixels"], ["brightness"], axes=[3], keepdims=0),
            node("Unsqueeze", ["brightness", "one"], ["channel"]),
            node("AveragePool", ["channel"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
            node("Squeeze", ["pooled", "one"], ["raw_map"]),
            node("ReduceMean", ["pixels"], ["colour"], axes=[1, 2], keepdims=0),
            node("Unsqueeze", ["colour", "one"], ["colours"]),
            node("Sub", ["colours", "prototypes"], ["differences"]),
            node("Mul", ["differences", "differences"], ["squares"]),
            node("ReduceSum", ["squares", "two"], ["distances"], keepdims=0),
            node("ArgMin", ["distances"], ["nearest"], axis=1, keepdims=0),
            node("Cast", ["nearest"], ["nearest_class"], to=types.INT32),
            node("ReduceMin", ["distances"], ["squared"], axes=[1], keepdims=0),
            node("Sqrt", ["squared"], ["distance"]),
            node("Div", ["distance", "spread"], ["class_distance"]),
            node("Gather", ["means", "nearest"], ["mean"]),
            node("Gather", ["stds", "nearest"], ["std"]),
            node("Sub", ["raw_map", "mean"], ["centred"]),
            node("Div", ["centred", "std"], ["standardised"]),
            node("Div", ["standardised", "divisor"], ["anomaly_map"]),
            node("Reshape", ["anomaly_map", "flat"], ["values"]),
            node("TopK", ["values", "four"], ["highest", "places"], axis=1),
            node("ReduceMean", ["highest"], ["score"], axes=[1], keepdims=0),
            node("Reshape", ["raw_map", "flat"], ["raw_values"]),
            node("TopK", ["raw_values", "four"], ["raw_highest", "raw_places"], axis=1),
            node("ReduceMean", ["raw_highest"], ["raw_score"], axes=[1], keepdims=0)]
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes, "detector", [info("image", types.UINT8, [batch, height, width, 3])],
            [info("score", types.FLOAT, [batch]), info("raw_score", types.FLOAT, [batch]),
             info("anomaly_map", types.FLOAT, [batch, *METADATA.map_size]),
             info("nearest_class", types.INT32, [batch]), info("class_distance", types.FLOAT, [batch])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, {KEY: metadata.to_json()})
        onnx.save(model, str(path))
        return path

    return make


@pytest.fixture(scope="session")
def detector(make_detector: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_detector(tmp_path_factory.mktemp("models") / "model.onnx")


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in MVTec layout, dark red and dark green with bright spots as defects; only red has masks."""
    root = tmp_path_factory.mktemp("data") / "mvtec"
    random = np.random.default_rng(0)
    for channel, name in ((0, "red"), (1, "green")):
        for index in range(4):
            for split, kind in (("train", "good"), ("test", "good"), ("test", "spot")):
                pixels = random.integers(0, 40, (48, 48, 3))
                pixels[..., channel] += 60
                mask = np.zeros((48, 48), np.uint8)
                if kind == "spot":
                    mask[8 + index:20 + index, 12:24] = 255
                    pixels[mask > 0] = 120 + 40 * index
                path = root / name / split / kind / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
                if kind == "spot" and name == "red":
                    path = root / name / "ground_truth" / kind / f"{index:03}_mask.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope="session")
def uadtool() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run the command line in a process of its own, with ``input`` on stdin."""

    def run(*arguments: object, input: str = "") -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "uadtool", *map(str, arguments)]
        return subprocess.run(command, input=input, capture_output=True, encoding="utf-8", timeout=300)

    return run


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Path]:
    """A program ``uadtool`` whose commands for models need not import torch, which takes seconds; see preloaded.py."""
    repository = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="uadtool-") as folder:
        address, program = f"{folder}/socket", Path(folder, "uadtool")
        program.write_text(f'''#!/bin/sh
case "$1" in
train|calibrate|quantize|export) exec "{sys.executable}" -S -E "{repository}/tests/preloaded.py" "{address}" "$@";;
*) exec "{sys.executable}" -m uadtool "$@";;
esac
''')
        program.chmod(0o755)
        with subprocess.Popen([sys.executable, "-m", "tests.preloaded", address], cwd=repository, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as server:
            assert server.stdin
            assert server.stdout
            assert server.stdout.readline() == b"ready\n"
            yield program
            server.stdin.close()


@pytest.fixture(scope="session")
def python38() -> Path:
    """The interpreter of JetPack 5."""
    candidates = [shutil.which("python3.8"), *Path.home().glob(".pyenv/versions/3.8*/bin/python3.8")]
    for path in filter(None, reversed(candidates)):  # pyenv's python3.8 on PATH may not be installed
        return Path(path)
    pytest.skip("no Python 3.8 on this machine")


@pytest.fixture(scope="session")
def random_teacher() -> List[str]:
    """The options of train for a small teacher with random weights."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    with only_one("mobilenetv2_035.pth") as weights:
        if not weights.exists():
            torch.manual_seed(0)
            torch.save(timm.create_model("mobilenetv2_035").state_dict(), weights)
    return ["--teacher", "mobilenetv2_035", "--teacher-weights", str(weights)]


@pytest.fixture(scope="session")
def textures() -> Path:
    """Two classes of textures in MVTec layout, 20 to train on and 8 + 8 to test; blots with masks as defects."""
    with only_one("textures") as root:
        if not root.exists():
            _draw_textures(root)
    return root


def _draw_textures(root: Path) -> None:
    random = np.random.default_rng(0)
    y, x = np.mgrid[:72, :72]
    for name in ("dots", "stripes"):
        for split, kind, count in (("train", "good", 20), ("test", "good", 8), ("test", "blot", 8)):
            for index in range(count):
                phase, period = random.uniform(0, 6), random.uniform(0.4, 0.8)
                wave = np.sin(x * period + phase) * (np.sin(y * period) if name == "dots" else 1)
                colour = random.uniform(60, 160, 3)
                pixels = colour + wave[..., None] * random.uniform(20, 60) + random.normal(0, 6, (72, 72, 3))
                image, mask = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.new("L", (72, 72))
                path = root / name / split / kind / f"{index:03}.png"
                if kind == "blot":
                    left, top = (int(value) for value in random.integers(8, 40, 2))
                    for picture, fill in ((image, (235, 20, 30)), (mask, 255)):
                        ImageDraw.Draw(picture).ellipse((left, top, left + 22, top + 16), fill=fill)
                    truth = root / name / "ground_truth" / kind / f"{index:03}_mask.png"
                    truth.parent.mkdir(parents=True, exist_ok=True)
                    mask.save(truth)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)


class Step(NamedTuple):
    """A command of the chain: the file it wrote, the record it printed, and its messages if it ran alone."""

    path: Path
    record: Dict[str, Any]
    stderr: str


@pytest.fixture(scope="session")
def step(preloaded: Path) -> Callable[..., Step]:
    """Run a command that writes ``output``, which names the step; all tests share the result.

    It runs in this process, or ``alone``, as a user runs it.
    """
    def run(command: str, *arguments: object, output: str, alone: bool = False) -> Step:
        with only_one(f"step-{output}") as folder:
            done = folder.with_name(f"{folder.name}.json")
            if not done.exists():
                folder.mkdir()
                done.write_text(json.dumps(_printed([command, *arguments, "-o", folder / output], alone)))
        record, stderr = json.loads(done.read_text())
        return Step(folder / output, record, stderr)

    def _printed(line: List[object], alone: bool) -> Tuple[Any, str]:
        if not alone:
            return json.loads(run_here(*line)), ""
        done = subprocess.run([preloaded, *map(str, line)], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def run_here(*line: object) -> str:
    """Run a command and return its stdout. Errors are raised. The level that -q or -v sets ends with the command."""
    level = log.level
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.main([str(part) for part in line], prog_name="uadtool", standalone_mode=False)
    finally:
        log.setLevel(level)
    return printed.getvalue()


def run_after(prelude: str, *line: object) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, after the program ``prelude``."""
    program = f"import sys\n{prelude}\nfrom uadtool.cli.main import main\nmain()"
    return subprocess.run([sys.executable, "-c", program, *map(str, line)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def trained(step: Callable[..., Step], textures: Path) -> Step:
    return step("train", textures, "--method", "stfpm", "--image-size", 64, "--epochs", 20,
                output="fp32.safetensors", alone=True)


@pytest.fixture(scope="session")
def calibrated(step: Callable[..., Step], trained: Step, textures: Path) -> Step:
    return step("calibrate", trained.path, textures, "--count", 30, output="ranges.json", alone=True)


@pytest.fixture(scope="session")
def quantized(step: Callable[..., Step], trained: Step, calibrated: Step) -> Step:
    return step("quantize", trained.path, "--ranges", calibrated.path, output="int8.safetensors", alone=True)


@pytest.fixture(scope="session")
def fp32(step: Callable[..., Step], trained: Step, textures: Path) -> Step:
    return step("export", trained.path, "--images", textures, output="fp32.onnx", alone=True)


@pytest.fixture(scope="session")
def int8(step: Callable[..., Step], quantized: Step) -> Step:
    return step("export", quantized.path, output="int8.onnx", alone=True)
