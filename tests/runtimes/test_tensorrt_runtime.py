"""`score` and `bench` with engines: what is refused, and, with stand-ins for TensorRT and the GPU, how they run."""

import gc
import logging
import sys
import threading

import numpy as np
import pytest
from conftest import METADATA, validate
from stand_in_gpu import MAX_BATCH, VERSION, Gpu

from uadtool.benchmarking.bench import _figures, _Measured
from uadtool.errors import MissingPackage, UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import describe
from uadtool.runtimes.opening import open_model
from uadtool.tensorrt import engine_file as files
from uadtool.tensorrt.builder import Engine
from uadtool.tensorrt.engine_file import save_engine
from uadtool.tensorrt.gpu import Gpu as CurrentGpu

XAVIER = CurrentGpu("Xavier", "7.2")
BUILD = {"package": "tensorrt", "version": VERSION, "gpu": XAVIER.name, "compute_capability": XAVIER.compute_capability,
         "precision": "fp16", "workspace": None, "max_batch": MAX_BATCH, "timing_cache": None, "dla": None,
         "gpu_fallback": False, "dla_fallback": []}


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "tensorrt", gpu.tensorrt())
    monkeypatch.setitem(sys.modules, "pycuda", type(sys)("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", gpu.driver())
    monkeypatch.setattr(files, "current_gpu", lambda: XAVIER)
    return gpu


@pytest.fixture
def engine(detector, tmp_path):
    """Write an engine; its plan is the ONNX file."""
    def engine(plan=None, metadata=METADATA, **build):
        path = str(tmp_path / "model.engine")
        built = Engine(plan or detector.read_bytes(), {**BUILD, **build})
        record = save_engine(built, metadata, file_digest(detector), path)
        validate(record, "engine")
        return path

    return engine


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, *METADATA.image_size, 3), np.uint8)


# How it runs


def test_an_engine_gives_what_the_onnx_file_gives(gpu, engine, detector):
    model, expected = open_model(engine(), 2), open_model(str(detector), 1, "onnxruntime")
    assert describe(model)["runtime"] == {"name": "tensorrt", "version": VERSION, "threads": 2, "streams": 1}
    assert model.metadata == METADATA
    for count in (1, MAX_BATCH, 2, 3 * MAX_BATCH + 1, 1):  # in parts where there are more than the engine takes
        for found, wanted in zip(model.run(images(count)), expected.run(images(count))):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert (gpu.synchronized, gpu.current) == (True, 0)


def test_fewer_images_than_the_engine_takes(gpu, engine, detector):
    gpu.min_batch = MAX_BATCH  # as a DLA has it
    model, expected = open_model(engine()), open_model(str(detector), 1, "onnxruntime")
    for count in (1, 3, MAX_BATCH + 1):
        np.testing.assert_allclose(model.run(images(count)).score, expected.run(images(count)).score, rtol=1e-6)
    assert gpu.shapes_set == 1


def test_results_are_not_overwritten_by_the_next_run(gpu, engine):
    model = open_model(engine())
    first = model.run(images(2))
    kept = [value.copy() for value in first]
    model.run(images(3))
    for value, copy in zip(first, kept):
        np.testing.assert_array_equal(value, copy)


def test_memory_is_taken_once_and_given_back(gpu, engine):
    model = open_model(engine())
    taken, held = gpu.allocations, sum(len(part) for part in gpu.memory.values())
    height, width = METADATA.map_size
    assert held == MAX_BATCH * (32 * 32 * 3 + 4 * (4 + height * width))
    assert model.gpu_bytes == held
    for _ in range(5):
        model.run(images(MAX_BATCH))
    assert (gpu.allocations, gpu.shapes_set) == (taken, 1)  # nor is a shape set anew that is that of before
    del model
    gc.collect()
    assert gpu.memory == {}


def test_other_threads_may_run_it(gpu, engine):
    model, found = open_model(engine()), []
    thread = threading.Thread(target=lambda: found.append(model.run(images(2)).score))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], model.run(images(2)).score)


def test_layers_come_from_tensorrts_profiler(gpu, engine):
    layers = open_model(engine()).layer_times(images(1), runs=3)
    assert [tuple(layer) for layer in layers] == [("convolution", "", 1.5), ("reduction", "", 0.25)]


def test_bench_reports_the_memory_on_the_gpu(gpu, engine):
    measured = _Measured(open_model(engine()), [1])
    measured.latencies, measured.cold_starts, measured.loads = [[0.001]], [(1.0, 1)], {}
    assert _figures(measured, measured)["gpu_bytes"] == measured.runtime.gpu_bytes


# What is refused


def test_an_engine_that_tensorrt_does_not_load(gpu, engine):
    with pytest.raises(UadtoolError, match=r"^TensorRT 8\.5\.2\.2 cannot load .*: magic tag does not match$"):
        open_model(engine(b"nonsense"))
    assert gpu.current == 0


def test_an_engine_that_is_not_a_detector(gpu, engine):
    other = Metadata.from_json(METADATA.replace(map_size=(4, 4)).to_json(), "")
    with pytest.raises(UadtoolError, match="is not a complete detector"):
        open_model(engine(metadata=other))
    assert gpu.current == 0


@pytest.mark.parametrize(("build", "message"), [
    ({"version": "8.4.1.5"}, r"was built by tensorrt 8\.4\.1\.5, but 8\.5\.2\.2 is installed; build it here: uadtool "
                             r"export .*model\.onnx -o .*model\.engine"),
    ({"compute_capability": "8.7"}, r"was built for compute capability 8\.7, but this Xavier has 7\.2; build it here"),
])
def test_an_engine_of_another_tensorrt_or_gpu(gpu, engine, build, message):
    with pytest.raises(UadtoolError, match=message):
        open_model(engine(**build))


def test_an_engine_of_another_model_of_gpu_runs_with_a_warning(gpu, engine, caplog):
    open_model(engine(gpu="Xavier NX"))
    assert caplog.record_tuples == [("uadtool", logging.WARNING, pytest.approx(caplog.messages[0]))]
    assert "was built on Xavier NX; a build for this Xavier may be faster" in caplog.text


def test_without_a_gpu(gpu, engine, monkeypatch):
    monkeypatch.setattr(files, "current_gpu", lambda: None)
    with pytest.raises(UadtoolError, match=r"needs a GPU, but no GPU or no driver was found; a CPU runs the"):
        open_model(engine())


@pytest.mark.parametrize(("package", "message"), [
    ("tensorrt", "TensorRT is not installed"), ("pycuda.driver", r"pip install 'uadtool\[jetson\]'")])
def test_without_a_package(gpu, engine, monkeypatch, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=message) as raised:
        open_model(engine())
    assert raised.value.exit_code == 3


def test_runtime_and_file_must_go_together(engine, detector):
    with pytest.raises(UadtoolError, match=r"is an engine, which openvino cannot run; give it the \.onnx file"):
        open_model(engine(), runtime="openvino")
    with pytest.raises(UadtoolError, match=r"TensorRT runs engines; first, on this device: uadtool export .*\.engine"):
        open_model(str(detector), runtime="tensorrt")


def test_score_and_bench_refuse_in_one_line(uadtool, engine, mvtec):
    pytest.importorskip("tensorrt_rtx")
    path = engine(package="tensorrt_rtx", version="1.0.0")
    for command in (["score", path, mvtec], ["bench", path]):
        done = uadtool(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert "was built by tensorrt_rtx 1.0.0, but" in done.stderr
