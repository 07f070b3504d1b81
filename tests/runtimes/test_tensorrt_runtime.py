"""`score` and `bench` with engines: what is refused, and, with stand-ins for TensorRT and the GPU, how they run."""

import gc
import logging
import re
import subprocess
import sys
import threading
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from pathlib import Path

import numpy as np
import pytest
from conftest import METADATA, validate
from stand_in_gpu import HELD, MAX_BATCH, VERSION, Gpu, compile_driver, headers

from uadtool.benchmarking.bench import _figures, _Measured
from uadtool.errors import MissingPackage, UadtoolError
from uadtool.files import file_digest
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import describe
from uadtool.runtimes.opening import open_model
from uadtool.tensorrt import driver
from uadtool.tensorrt.builder import Engine
from uadtool.tensorrt.driver import current_gpu
from uadtool.tensorrt.engine_file import save_engine

NOTHING = dict.fromkeys(HELD, 0)
BUILD = {"package": "tensorrt", "version": VERSION, "gpu": "Xavier", "compute_capability": "7.2",
         "precision": "fp16", "workspace": None, "max_batch": MAX_BATCH, "timing_cache": None, "dla": None,
         "gpu_fallback": False, "dla_fallback": []}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpu(library, monkeypatch):
    gpu = Gpu(library)
    monkeypatch.setitem(sys.modules, "tensorrt", gpu.tensorrt())
    monkeypatch.setattr(driver, "LIBRARY", library)
    yield gpu
    gc.collect()
    assert {**gpu.held(), "launches": 0} == NOTHING


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
    for count in (1, MAX_BATCH, 2, 2, 2, 3 * MAX_BATCH + 1, 1):  # in parts where there are more than the engine takes
        for found, wanted in zip(model.run(images(count)), expected.run(images(count))):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert gpu.held()["current"] == 0


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


def test_equal_batches_are_one_launch_of_a_graph(gpu, engine, detector):
    model, expected = open_model(engine()), open_model(str(detector), 1, "onnxruntime")
    for count, launches in ((2, 0), (2, 1), (2, 2), (3, 2), (2, 2), (2, 3)):
        pixels = images(count) + np.uint8(launches)
        np.testing.assert_allclose(model.run(pixels).anomaly_map, expected.run(pixels).anomaly_map, rtol=1e-6)
        assert gpu.held()["launches"] == launches
    assert gpu.held()["graphs"] == 1


def test_an_engine_that_cannot_be_recorded_runs_without_a_graph(gpu, engine, detector):
    gpu.recordable = False
    model, expected = open_model(engine()), open_model(str(detector), 1, "onnxruntime")
    for _ in range(3):
        np.testing.assert_allclose(model.run(images(2)).score, expected.run(images(2)).score, rtol=1e-6)
    assert gpu.held()["launches"] == gpu.held()["graphs"] == 0


def test_memory_is_taken_once_and_given_back(gpu, engine):
    height, width = METADATA.map_size
    with open_model(engine()) as model:
        taken = gpu.held()
        images_size, outputs_size = MAX_BATCH * 32 * 32 * 3, MAX_BATCH * 4 * (4 + height * width)
        assert images_size + outputs_size <= taken["device_bytes"] < images_size + outputs_size + 5 * 256
        assert model.gpu_bytes == taken["device_bytes"]
        for _ in range(5):
            model.run(images(MAX_BATCH))
        assert gpu.held()["device_blocks"] == taken["device_blocks"]
        assert gpu.shapes_set == 1  # nor is a shape set anew that is that of before
    assert {**gpu.held(), "launches": 0} == NOTHING
    model.close()  # again
    with pytest.raises(UadtoolError, match=r"model\.engine was closed; open it again"):
        model.run(images(1))


def test_a_detector_that_is_dropped_in_another_thread_gives_all_back(gpu, engine):
    kept = [open_model(engine())]
    kept[0].run(images(1))
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert gpu.held() == NOTHING


def test_a_process_that_ends_gives_all_back(library, engine):
    program = f"""
import atexit, sys
sys.path[:0] = {sys.path!r}
from stand_in_gpu import Gpu
from uadtool.runtimes.opening import open_model
from uadtool.tensorrt import driver
gpu = Gpu({library!r})
atexit.register(lambda: print(gpu.held()))
driver.LIBRARY, sys.modules["tensorrt"] = {library!r}, gpu.tensorrt()
model = open_model({engine()!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{NOTHING}\n", "")


def test_after_an_error_on_the_gpu_the_message_is_that_of_the_error(gpu, engine):
    def fail():
        with open_model(engine()) as model:
            model.run(images(1))
            gpu.driver.stand_in_fail(700)  # CUDA_ERROR_ILLEGAL_ADDRESS, after which nothing works
            model.run(images(1))

    with pytest.raises(UadtoolError, match=r"^the GPU's driver refused cuStreamSynchronize: an error \(700\)$"):
        fail()
    gpu.driver.stand_in_fail(0)
    assert gpu.held()["device_blocks"] == 0


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
    assert gpu.held() == NOTHING


def test_a_driver_that_does_not_suit_tensorrt(gpu, engine, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", lambda: None)  # TensorRT 8.5 raises a TypeError, too
    with pytest.raises(UadtoolError, match=r"^TensorRT 8\.5\.2\.2 cannot use the GPU; check that its driver is new "):
        open_model(engine())
    assert gpu.held() == NOTHING


def test_an_engine_that_is_not_a_detector(gpu, engine):
    other = Metadata.from_json(METADATA.replace(map_size=(4, 4)).to_json(), "")
    with pytest.raises(UadtoolError, match="is not a complete detector"):
        open_model(engine(metadata=other))
    assert gpu.held() == NOTHING


@pytest.mark.parametrize(("build", "message"), [
    ({"version": "8.4.1.5"}, r"was built by tensorrt 8\.4\.1\.5, but 8\.5\.2\.2 is installed; build it here: uadtool "
                             r"export .*model\.onnx -o .*model\.engine"),
    ({"compute_capability": "8.7"}, r"was built for compute capability 8\.7, but this Xavier has 7\.2; build it here"),
])
def test_an_engine_of_another_tensorrt_or_gpu(gpu, engine, build, message):
    with pytest.raises(UadtoolError, match=message):
        open_model(engine(**build))


@pytest.mark.parametrize(("build", "message"), [
    ({"gpu": "Xavier NX"}, "was built on Xavier NX; a build for this Xavier with 6 may be faster"),
    ({"gpu": "Xavier", "multiprocessors": 8}, "Xavier with 8 multiprocessors; a build for this Xavier with 6 may be"),
    ({"gpu": "Xavier", "multiprocessors": 6}, None), ({"gpu": "Xavier"}, None), ({"gpu": None}, None),
])
def test_an_engine_of_another_model_of_gpu_runs_with_a_warning(gpu, engine, caplog, build, message):
    open_model(engine(**build))
    assert [(level, message in text) for _, level, text in caplog.record_tuples] == (
        [(logging.WARNING, True)] if message else [])


def test_without_a_gpu(gpu, engine, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libnone.so")
    with pytest.raises(UadtoolError, match=r"needs a GPU, but no GPU or no driver was found; a CPU runs the"):
        open_model(engine())


def test_without_tensorrt(gpu, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackage, match="TensorRT is not installed") as raised:
        open_model(engine())
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("shortage", [{"memory_limit": 10_000}, {"has_context": False}])
def test_an_engine_that_does_not_fit_into_memory(gpu, engine, shortage):
    if "memory_limit" in shortage:
        gpu.memory_limit(shortage["memory_limit"])
    gpu.has_context = shortage.get("has_context", True)
    message = (r"model\.engine does not fit into the GPU's memory, of which \d+ MB are free; end other programs, or "
               "build it with a smaller --max-batch$")
    with pytest.raises(UadtoolError, match=message):
        open_model(engine())
    assert gpu.held() == NOTHING


# The driver


@pytest.mark.skipif(not headers(), reason="no cuda.h on this machine")
def test_the_stand_in_has_the_functions_of_the_real_driver(tmp_path):
    """The compiler compares them with NVIDIA's declarations."""
    for header in headers():
        assert compile_driver(tmp_path, f'-DHEADER="{header}"')


@pytest.mark.skipif(not headers(), reason="no cuda.h on this machine")
def test_functions_are_called_as_cuda_h_declares_them():
    kinds = {"int": c_int, "CUdevice": c_int, "CUdevice_attribute": c_int, "CUresult": c_int, "unsigned int": c_uint,
             "CUstreamCaptureMode": c_int, "size_t": c_size_t, "CUdeviceptr": c_uint64,
             "unsigned long long": c_ulonglong}
    for header in headers():
        text = Path(header).read_text(encoding="utf-8")
        for name, found in driver.SIGNATURES.items():
            names = {name, name.partition("_")[0].replace("WithFlags", "")}
            declared = re.search(rf"^CUresult CUDAAPI ({'|'.join(names)})\((.*?)\);", text, re.MULTILINE)
            expected = []
            for argument in declared[2].split(","):
                kind, pointers = re.sub(r"^const ", "", argument.strip()).rpartition(" ")[0], argument.count("*")
                if pointers:
                    value = {"char": c_char_p, "void": c_void_p}.get(kind)
                    value = value if value and pointers == 1 else POINTER(value or kinds.get(kind, c_void_p))
                else:
                    value = kinds.get(kind, c_void_p)
                expected.append(value)
            assert found == expected, (header, name)


def test_the_gpu_is_the_drivers(gpu, monkeypatch):
    assert current_gpu() == ("Xavier", "7.2", 6)
    monkeypatch.setattr(driver, "LIBRARY", "libnone.so")
    assert current_gpu() is None
    with pytest.raises(UadtoolError, match=r"no GPU can be used, because its driver is missing or too old: libnone"):
        driver.Device()


def test_what_the_driver_refuses_is_said(gpu):
    device = driver.Device()
    with pytest.raises(UadtoolError, match=r"^the GPU's driver refused cuMemAlloc: invalid device context \(201\)$"):
        device.allocate(1)  # no context is current
    device.close()


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
