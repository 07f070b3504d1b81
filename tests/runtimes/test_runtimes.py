import contextlib
import gc
import importlib.util
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from conftest import METADATA, SCORE_TOLERANCE, validate
from hypothesis import given
from hypothesis import strategies as st

from uadtool.cli import options
from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image
from uadtool.errors import MissingPackage, UadtoolError
from uadtool.files import file_digest
from uadtool.host import adds_int8_exactly
from uadtool.metadata import KEY
from uadtool.runtimes import onnxruntime
from uadtool.runtimes import opening as runtimes
from uadtool.runtimes.contract import describe
from uadtool.runtimes.onnx_file import read_metadata, read_properties
from uadtool.runtimes.opening import RUNTIMES, open_model

needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
EACH = ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]
"""Those that run ONNX files; engines have tests of their own."""
QUICK = ["--repetitions", "2", "--duration", "0.01"]


@pytest.fixture
def missing(monkeypatch):
    """Make packages look as if they were not installed."""
    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


# What they compute


def runs_on(path, images):
    """What ONNX Runtime and OpenVINO say about the images."""
    return [open_model(str(path), 1, runtime).run(images) for runtime in ("onnxruntime", "openvino")]


@needs_openvino
@pytest.mark.parametrize("count", [1, 3, 2])
def test_both_compute_the_same(detector, count):
    images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)
    for expected, found in zip(*runs_on(detector, images)):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@needs_openvino
def test_openvino_takes_any_batch_size_in_any_order(detector):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    model = open_model(str(detector), 1, "openvino")
    scores = model.run(images).score
    for part in (slice(0, 2), slice(4, 5), slice(0, 5), slice(1, 3)):
        np.testing.assert_allclose(model.run(images[part]).score, scores[part], rtol=1e-5)


@pytest.fixture(scope="module")
def pictures(textures):
    return np.stack([read_image(sample.path, (64, 64)) for sample in scoring_samples([str(textures)])])


@needs_openvino
def test_both_give_a_float_model_the_same_scores(fp32, pictures):
    expected, found = runs_on(fp32.path, pictures)
    np.testing.assert_array_equal(found.nearest_class, expected.nearest_class)
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-3, atol=1e-3)  # bf16 would be off by 1e-2
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3)


@needs_openvino
@pytest.mark.skipif(not adds_int8_exactly(), reason="OpenVINO's int8 products overflow on this processor")
def test_both_give_an_int8_model_almost_the_same_scores(int8, pictures):
    """OpenVINO fuses a convolution with the addition after it, and does not round between them."""
    parity = pytest.importorskip("uadtool.lab.onnx_export.parity")
    expected, found = runs_on(int8.path, pictures)
    same = found.nearest_class == expected.nearest_class
    assert same.mean() >= parity.CLASS_AGREEMENT["int8"]
    difference = np.abs(found.score - expected.score) / np.maximum(1, np.abs(expected.score))
    assert difference[same].max() <= parity.TOLERANCE["int8"]


@needs_openvino
def test_openvino_computes_an_int8_model_in_integers(int8):
    model = open_model(str(int8.path), 1, "openvino")
    nodes = [node.get_rt_info() for node in model._compiled[1].get_runtime_model().get_ops()]
    types = [node["runtimePrecision"].astype(str) for node in nodes if node["layerType"].astype(str) == "Convolution"]
    assert len(types) > 10
    assert set(types) <= {"u8", "i8"}


@pytest.mark.parametrize("name", ["trained", "quantized"])
def test_torch_gives_the_scores_of_the_exported_model(request, fp32, int8, name, pictures):
    path = str(request.getfixturevalue(name).path)
    found = open_model(path, 1, "torch").run(pictures)
    exported, precision = {"trained": (fp32, "fp32"), "quantized": (int8, "int8")}[name]
    expected = open_model(str(exported.path), 1, "onnxruntime").run(pictures)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    np.testing.assert_allclose(found.score, expected.score, **SCORE_TOLERANCE[precision])


@pytest.mark.parametrize("exact", [True, False])
def test_weights_become_u8_only_where_int8_products_overflow(monkeypatch, int8, pictures, exact):
    """That is exact everywhere, but with VNNI it takes 2.5 times as long."""
    expected = open_model(str(int8.path), 1, "onnxruntime").run(pictures)
    monkeypatch.setattr(onnxruntime, "adds_int8_exactly", lambda: exact)
    model = open_model(str(int8.path), 1, "onnxruntime")
    option = model._session.get_session_options().get_session_config_entry(onnxruntime.PRECISE)
    assert option == ("0" if exact else "1")
    if adds_int8_exactly():
        np.testing.assert_array_equal(model.run(pictures).score, expected.score)


def test_torch_times_layers(trained):
    layers = open_model(str(trained.path), 1, "torch").layer_times(np.zeros((1, 64, 64, 3), np.uint8), runs=2)
    assert sum("Conv2d" in layer.kind for layer in layers) == 2 * 33
    assert all(layer.milliseconds > 0 for layer in layers)


@pytest.mark.parametrize("name", [*EACH, "torch"])
def test_a_detector_is_closed(request, fp32, trained, name):
    with open_model(str(trained.path if name == "torch" else fp32.path), 1, name) as model:
        pixels = np.zeros((1, *model.metadata.image_size, 3), np.uint8)
        weak = [weakref.ref(value) for value in vars(model).values() if type(value).__name__ in (
            "InferenceSession", "Model", "STFPM")]
        assert model.run(pixels).score.shape == (1,)
    model.close()
    gc.collect()
    assert [reference() for reference in weak] == [None]


def test_score_runs_torch_when_asked(uadtool, trained, fp32, textures, detector):
    image = textures / "dots/test/blot/000.png"
    found, expected = (json.loads(uadtool("score", *command).stdout.splitlines()[1])["score"] for command in (
        (trained.path, image, "--runtime", "torch"), (fp32.path, image)))
    assert found == pytest.approx(expected, abs=1e-3)
    refused = uadtool("score", detector, image, "--runtime", "torch")
    assert refused.returncode == 1
    assert "torch runs .safetensors files, not" in refused.stderr


# What takes how long


@pytest.mark.parametrize("runtime", EACH)
def test_layers_and_their_times(fp32, runtime):
    model = open_model(str(fp32.path), 1, runtime)
    layers = model.layer_times(np.zeros((1, 64, 64, 3), np.uint8), runs=3)
    convolutions = [layer for layer in layers if "Conv" in layer.kind]
    assert len(convolutions) > 20
    assert len({layer.name for layer in layers}) == len(layers)
    assert sum(layer.milliseconds for layer in convolutions) > 0


def test_bench_reports_layers_when_asked(uadtool, fp32):
    for asked, present in ([], False), (["--layers"], True):
        done = uadtool("bench", "-q", fp32.path, *QUICK, "--batch-sizes", "1", "--threads", "1", *asked)
        assert (done.returncode, done.stderr) == (0, "")
        record = json.loads(done.stdout)
        validate(record, "bench")
        assert ("layers" in record["models"][0]) == present


# Choosing one


def test_the_option_offers_them_all():
    assert list(options.runtime(lambda: None).__click_params__[0].type.choices) == ["auto", *RUNTIMES]


@pytest.mark.parametrize(("target", "absent", "chosen"), [
    (None, [], "onnxruntime"),
    ("onnxruntime", [], "onnxruntime"),
    pytest.param("openvino", [], "openvino", marks=needs_openvino),
    pytest.param("tensorrt", [], "openvino", marks=needs_openvino),
    ("openvino", ["openvino"], "onnxruntime"),
    pytest.param(None, ["onnxruntime"], "openvino", marks=needs_openvino)])
def test_auto_chooses_an_installed_runtime_that_suits(make_detector, missing, tmp_path, caplog, monkeypatch, target,
                                                      absent, chosen):
    monkeypatch.setattr(runtimes, "adds_int8_exactly", lambda: True)
    caplog.set_level(logging.INFO, "uadtool")
    path = str(make_detector(tmp_path / "model.onnx", METADATA.replace(target=target)))
    missing(*absent)
    model = open_model(path, 1)
    assert (model.name, model.threads) == (chosen, 1)
    other = "onnxruntime" if chosen == "openvino" else "openvino"
    told = [f"{path} runs on {chosen} (chosen by its kind; --runtime {other} also runs it)"]
    assert caplog.messages == (told if other not in absent and importlib.util.find_spec("openvino") else [])


@needs_openvino
def test_a_choice_is_reported_on_stderr(uadtool, detector, mvtec):
    command = ["score", detector, mvtec / "red/test/spot/003.png"]
    told = f"uadtool: {detector} runs on onnxruntime (chosen by its kind; --runtime openvino also runs it)\n"
    for asked, expected in (([], told), (["-q"], ""), (["--runtime", "onnxruntime"], "")):
        done = uadtool(*command, *asked)
        assert (done.returncode, done.stderr) == (0, expected)


@pytest.mark.parametrize(("absent", "runtime", "named"), [
    (["onnxruntime"], "onnxruntime", "onnxruntime"),
    (["openvino"], "openvino", "openvino"),
    (list(RUNTIMES), "auto", "onnxruntime"),
])
def test_a_missing_runtime_is_named(detector, missing, absent, runtime, named):
    missing(*absent)
    with pytest.raises(MissingPackage, match=rf"^{named} is not installed; pip install 'uadtool\[{named}\]'") as error:
        open_model(str(detector), runtime=runtime)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("runtime", EACH)
def test_score_and_bench_run_on_the_named_runtime(detector, mvtec, tmp_path, runtime):
    imported = tmp_path / "imported"
    imported.mkdir()
    (tmp_path / "sitecustomize.py").write_text(f"""
import atexit, os, sys
@atexit.register
def note():
    with open({str(imported)!r} + f"/{{os.getpid()}}", "w") as file:
        file.write(" ".join(sorted({set(RUNTIMES)!r} & set(sys.modules))))
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    image = str(mvtec / "red/test/spot/003.png")
    described = describe(open_model(str(detector), 1, runtime))["runtime"]
    assert described["name"] == runtime
    for arguments, processes in (["score", str(detector), image], 1), (["bench", str(detector), *QUICK], 3):
        command = [sys.executable, "-m", "uadtool", *arguments, "--runtime", runtime, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        record = json.JSONDecoder().raw_decode(done.stdout)[0]
        (entry,) = record.get("models", [record])
        assert entry["runtime"] == described
        assert [file.read_text() for file in imported.iterdir()] == [runtime] * processes
        for file in imported.iterdir():
            file.unlink()


@needs_openvino
def test_openvino_sends_no_telemetry(detector, tmp_path):
    program = """
import sys
from uadtool.runtimes.opening import open_model
open_model(sys.argv[1], 1, "openvino")
print(*(name for name in sys.modules if name.startswith(("openvino_telemetry", "openvino.tools.ovc"))))
"""
    done = subprocess.run([sys.executable, "-c", program, str(detector)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "HOME": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("\n", "")
    assert list(tmp_path.iterdir()) == []


# Files that cannot be run


@pytest.mark.parametrize(("name", "message"), [
    ("missing.onnx", "no such model file"),
    ("model.safetensors", "export it first: uadtool export .*model.safetensors -o model.onnx"),
    ("model.engine", "has no model.engine.json beside it"),
    ("model.pb", r"its name must end in \.onnx, \.engine or \.safetensors"),
    ("model.onnx", "model.onnx is damaged or not an ONNX file"),
])
def test_files_that_are_not_exported_detectors(tmp_path, name, message):
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"\x08\x08 not a model")
    with pytest.raises(UadtoolError, match=message) as error:
        open_model(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.fixture
def changed(detector, tmp_path):
    """Write the detector with a change to its ModelProto."""
    onnx = pytest.importorskip("onnx")

    def write(change):
        proto = onnx.load(str(detector))
        change(proto)
        onnx.save(proto, str(tmp_path / "changed.onnx"))
        return str(tmp_path / "changed.onnx")

    return write


@pytest.mark.parametrize("runtime", EACH)
def test_graphs_that_are_not_exported_detectors(make_detector, changed, tmp_path, runtime):
    fixed = make_detector(tmp_path / "fixed.onnx", batch=1)
    other_size = make_detector(tmp_path / "size.onnx", METADATA.replace(image_size=(64, 64)))
    lacking = changed(lambda proto: proto.graph.output.pop())
    for path, has in (fixed, "[1, 32, 32, 3] -> "), (other_size, "[N, 32, 32, 3] -> "), (lacking, "-> score: float32"):
        with pytest.raises(UadtoolError, match="not a complete detector: it has image: uint8 ") as error:
            open_model(str(path), 1, runtime)
        assert has in str(error.value)


@pytest.mark.parametrize("runtime", EACH)
def test_a_graph_that_the_runtime_does_not_know(changed, runtime):
    path = changed(lambda proto: setattr(proto.graph.node[0], "op_type", "Hammer"))
    with pytest.raises(UadtoolError, match=f"changed.onnx cannot be loaded by {runtime}: .*Hammer") as error:
        open_model(path, 1, runtime)
    assert "\n" not in str(error.value)


def test_files_of_others(changed):
    with pytest.raises(UadtoolError, match="not made by uadtool"):
        open_model(changed(lambda proto: proto.ClearField("metadata_props")))


# Metadata


def test_metadata_of_an_exported_detector(detector):
    assert read_metadata(str(detector)) == METADATA


@given(st.dictionaries(st.text(), st.text()), st.integers(0, 2**63 - 1), st.binary())
def test_properties_are_what_onnx_wrote(properties, version, data):
    onnx = pytest.importorskip("onnx")
    proto = onnx.ModelProto(model_version=version, doc_string=data.hex())
    proto.graph.initializer.add(raw_data=data, dims=[len(data)])
    onnx.helper.set_model_props(proto, properties)
    assert read_properties(proto.SerializeToString()) == properties


@given(st.data())
def test_damaged_bytes_never_crash(detector, data):
    content = bytearray(detector.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read_properties(bytes(content[:data.draw(st.integers(0, len(content)))]))


@given(st.binary(max_size=200))
def test_garbage_never_crashes(content):
    with contextlib.suppress(ValueError):
        assert KEY not in read_properties(content)


def test_a_file_that_was_cut_off_is_noticed(detector, tmp_path):
    content = detector.read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "model.onnx").write_bytes(content[:size])
        with pytest.raises(UadtoolError, match=r"is damaged or not an ONNX file|not made by uadtool"):
            read_metadata(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("content", [
    b"\x72\x02\x0a",  # metadata_props of 2 bytes, 1 there
    b"\x72\x03\x0a\x05k",  # a key of 5 bytes, 1 there
    b"\x72\x03\x0a\x01\xff",  # a key that is not UTF-8
    b"\x08" + b"\x80" * 10 + b"\x01",  # a number of 11 bytes
    b"\x39\x00",  # a fixed number of 8 bytes, 1 there
    b"\x0b",  # a wire type that protobuf no longer has
])
def test_damaged_protobuf(content):
    with pytest.raises(ValueError, match=r"too early|does not end|wire type|decode"):
        read_properties(content)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UadtoolError, match=r"cannot read .*: No such file"):
        read_metadata(str(tmp_path / "model.onnx"))


# Files that are replaced


def replacing(monkeypatch, replace, times):
    """Let the file be replaced between the reading of its metadata and of its graph, so many times."""
    read, left = runtimes.read_metadata, iter(range(times))

    def read_and_replace(path):
        metadata = read(path)
        if next(left, None) is not None:
            replace()
        return metadata

    monkeypatch.setattr(runtimes, "read_metadata", read_and_replace)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_replaced_while_it_is_opened_is_opened_anew(make_detector, tmp_path, monkeypatch, in_place):
    path, other = make_detector(tmp_path / "model.onnx"), make_detector(
        tmp_path / "other.onnx", METADATA.replace(threshold=5.0), divisor=2.0)
    content = other.read_bytes()
    replacing(monkeypatch, lambda: path.write_bytes(content) if in_place else other.replace(path), 1)
    model = open_model(str(path), 1, "onnxruntime")
    assert model.metadata.threshold == 5.0
    assert describe(model)["model"]["digest"] == file_digest(path)
    path.write_bytes(content)
    with pytest.raises(UadtoolError, match=r"model.onnx was replaced while this ran; run it again"):
        describe(model)


def test_a_model_that_is_always_being_replaced(make_detector, tmp_path, monkeypatch):
    path = make_detector(tmp_path / "model.onnx")
    replacing(monkeypatch, lambda: path.touch(), 1000)
    with pytest.raises(UadtoolError, match=r"was replaced whenever it was opened; run this again once it stays"):
        open_model(str(path), 1, "onnxruntime")


@pytest.mark.parametrize("runtime", EACH)
def test_a_file_that_is_written_to_later_changes_nothing(make_detector, tmp_path, runtime):
    path = make_detector(tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    model = open_model(str(path), 1, runtime)
    before = model.run(images)
    path.write_bytes(b"\xff" * (path.stat().st_size // 2))
    assert all((one == other).all() for one, other in zip(before, model.run(images)))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_many_processes_read_a_model_that_is_replaced_again_and_again(make_detector, mvtec, tmp_path, in_place):
    """Each says what one of the two models says, and that it was this one; or, in one line, that it cannot."""
    image = mvtec / "red/test/spot/003.png"
    models = [make_detector(tmp_path / f"{divisor}.onnx", divisor=divisor) for divisor in (1.0, 2.0)]
    expected = {}
    for model in models:
        runtime = open_model(str(model), 1, "onnxruntime")
        score = runtime.run(read_image(str(image), (32, 32))[None]).score[0]
        expected[file_digest(model)] = pytest.approx(float(score), rel=1e-4)
    path = tmp_path / "model.onnx"
    shutil.copy(models[0], path)
    command = [sys.executable, "-m", "uadtool", "score", "-q", "--threads", "1", str(path), str(image)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for _ in range(16)]
    for turn in itertools.cycle([1, 0]):
        if in_place:
            path.write_bytes(models[turn].read_bytes())
        else:
            shutil.copy(models[turn], tmp_path / "new.onnx")
            (tmp_path / "new.onnx").replace(path)
        if all(process.poll() is not None for process in processes):
            break
        time.sleep(0.5)
    codes = []
    for process in processes:
        printed, said = process.communicate()
        codes.append(process.returncode)
        assert said.count("\n") == (process.returncode != 0)
        if process.returncode == 0:
            run, found, _ = map(json.loads, printed.splitlines())
            assert found["score"] == expected[run["model"]["digest"]]
    print(f"{codes.count(0)} of 16 processes read the model")
    assert set(codes) <= {0, 1}
    assert codes.count(0) > 8
