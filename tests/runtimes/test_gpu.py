"""Engines on a real GPU against ONNX Runtime: `make test-gpu`. Skipped where there is none."""

import importlib.util

import numpy as np
import pytest
from flavours import flavour

from uadtool.benchmarking.bench import Settings, bench
from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image
from uadtool.files import file_digest
from uadtool.lab.onnx_export.writer import save_onnx
from uadtool.runtimes.opening import open_model
from uadtool.tensorrt.builder import BuildOptions, build_engine
from uadtool.tensorrt.driver import Device, current_gpu
from uadtool.tensorrt.engine_file import save_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(current_gpu() is None, reason="no NVIDIA GPU, or no driver"),
    pytest.mark.skipif(not importlib.util.find_spec("tensorrt"), reason="TensorRT is not installed"),
]
DETECTORS = ("tf_efficientnet_lite0", "resnet18", "duet")
TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.25, "mixed": 0.25}
"""Of a score, relative to the larger of it and 1."""
MAX_BATCH = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The paths of an ONNX file and of the engine that was built from it here."""
    folder, made = tmp_path_factory.mktemp("engines"), {}

    def files(detector, precision):
        if (detector, precision) not in made:
            one, onnx = flavour(detector, "tensorrt", precision), str(folder / f"{detector}-{precision}.onnx")
            save_onnx(one.proto, onnx)
            path = onnx.replace(".onnx", ".engine")
            engine = build_engine(onnx, one.metadata, BuildOptions(max_batch=MAX_BATCH))
            save_engine(engine, one.metadata, file_digest(onnx), path)
            made[detector, precision] = onnx, path
        return made[detector, precision]

    return files


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("detector", DETECTORS)
def test_an_engine_scores_as_the_onnx_file_does(files, textures, detector, precision):
    images = np.stack([read_image(sample.path, (64, 64)) for sample in scoring_samples([str(textures)])])
    onnx, path = files(detector, precision)
    expected, found = open_model(onnx, 1, "onnxruntime").run(images), open_model(path).run(images)
    same = found.nearest_class == expected.nearest_class
    assert same.mean() >= 0.9
    difference = np.abs(found.score - expected.score) / np.maximum(1, np.abs(expected.score))
    assert difference[same].max() <= TOLERANCE[precision]
    maps = np.abs(found.anomaly_map - expected.anomaly_map)[same]
    assert np.median(maps) <= TOLERANCE[precision] * max(1, np.abs(expected.anomaly_map).mean())


def test_batches_change_nothing(files, textures):
    images = np.stack([read_image(sample.path, (64, 64)) for sample in scoring_samples([str(textures)])][:7])
    model = open_model(files("resnet18", "fp32")[1])
    together = model.run(images).score
    for count in (1, 3, MAX_BATCH):
        np.testing.assert_allclose(model.run(images[:count]).score, together[:count], rtol=0.02, atol=0.02)


def test_memory_stays_while_it_runs_and_is_freed(files):
    images = np.zeros((MAX_BATCH, 64, 64, 3), np.uint8)
    device = Device()
    with device.current():
        with open_model(files("resnet18", "fp32")[1]) as model:
            for _ in range(3):  # the last two as a graph
                model.run(images)
            held = device.free_memory()
            for _ in range(100):
                model.run(images)
            assert device.free_memory() == held
        freed = device.free_memory()  # CUDA and TensorRT keep something for the process, once
        assert freed > held
        for _ in range(5):
            with open_model(files("resnet18", "fp32")[1]) as model:
                model.run(images)
        assert freed - device.free_memory() < 4e6
    device.close()


def test_layers_and_latencies(files, capsys):
    """The table that `make test-gpu` shows."""
    paths = [files(detector, precision)[1] for detector in DETECTORS for precision in TOLERANCE]
    record = bench(paths, Settings(repetitions=2, duration=0.5, layers=True))
    with capsys.disabled():
        print(f"\n{current_gpu().name}, 64 px: p50 ms, images per second in batches of 8, MB on the GPU")
        for path, model in zip(paths, record["models"]):
            rate = model["throughput"][-1]["images_per_second"]["median"]
            print(f"{path.rpartition('/')[2]:36} {model['latency_ms']['p50']:8.3f} {rate:8.0f} "
                  f"{model['gpu_bytes'] / 1e6:8.1f}")
    for model in record["models"]:
        assert model["gpu_bytes"] > 0
        assert sum(layer["milliseconds"] for layer in model["layers"]) < 5 * model["latency_ms"]["p50"]
