"""A tiny detector that honours the contract of an exported one, and a tiny dataset for it."""

import subprocess
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from PIL import Image

from uadtool.metadata import KEY, Metadata, ScoreStatistics

METADATA = Metadata(
    method="brightness", teacher="none", classes=["green", "red"], image_size=(32, 32), map_size=(8, 8), threshold=3.0,
    false_positive_rate=0.05, statistics={"green": ScoreStatistics(40.0, 20.0), "red": ScoreStatistics(40.0, 10.0)},
    parameters=6, macs=1024, target="onnxruntime", tool_version="0.1.0",
)
"""Good images of either class are dark: their brightness is about that of the statistics."""


@pytest.fixture(scope="session")
def make_detector() -> Callable[..., Path]:
    """Write a detector whose map is the brightness of 4 x 4 pixels, in units of the class of the nearest colour."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, types = onnx.helper, onnx.numpy_helper, onnx.TensorProto

    def make(path: Path, metadata: Metadata = METADATA, batch: str = "N", divisor: float = 1.0) -> Path:
        height, width = METADATA.image_size
        statistics = [METADATA.statistics[name] for name in METADATA.classes]
        constants = {
            "prototypes": np.array([[[0, 80, 0], [80, 0, 0]]], np.float32),
            "means": np.array([s.mean for s in statistics], np.float32).reshape(-1, 1, 1),
            "stds": np.array([s.std for s in statistics], np.float32).reshape(-1, 1, 1),
            "divisor": np.array(divisor, np.float32),
            "one": np.array([1]), "two": np.array([2]), "four": np.array([4]), "flat": np.array([0, -1]),
        }
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
            node("Gather", ["means", "nearest"], ["mean"]),
            node("Gather", ["stds", "nearest"], ["std"]),
            node("Sub", ["raw_map", "mean"], ["centred"]),
            node("Div", ["centred", "std"], ["standardised"]),
            node("Div", ["standardised", "divisor"], ["anomaly_map"]),
            node("Reshape", ["anomaly_map", "flat"], ["values"]),
            node("TopK", ["values", "four"], ["highest", "places"], axis=1),
            node("ReduceMean", ["highest"], ["score"], axes=[1], keepdims=0),
        ]
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes, "detector", [info("image", types.UINT8, [batch, height, width, 3])],
            [info("score", types.FLOAT, [batch]), info("anomaly_map", types.FLOAT, [batch, *METADATA.map_size]),
             info("nearest_class", types.INT32, [batch])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
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
    """Run the command line in a process of its own; ``input`` is what it reads from stdin."""

    def run(*arguments: object, input: str = "") -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "uadtool", *map(str, arguments)]
        return subprocess.run(command, input=input, capture_output=True, encoding="utf-8", timeout=60)

    return run
