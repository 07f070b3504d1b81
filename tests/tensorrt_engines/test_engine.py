"""`export MODEL.onnx -o MODEL.engine`: files, options and refusals."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import validate
from flavours import flavour

from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.lab.onnx_export.writer import save_onnx
from uadtool.tensorrt import versions
from uadtool.tensorrt.builder import BuildOptions, _use_dla, _use_timing_cache, build_engine
from uadtool.tensorrt.driver import current_gpu
from uadtool.tensorrt.engine_file import read_engine_metadata

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """The files of detectors, by target and precision."""
    folder = tmp_path_factory.mktemp("onnx")
    paths = {}
    for target, precision in (("tensorrt", "fp32"), ("tensorrt", "int8"), ("onnxruntime", "int8")):
        paths[target, precision] = folder / f"{target}-{precision}.onnx"
        save_onnx(flavour("resnet18", target, precision).proto, paths[target, precision])
    return paths


@pytest.fixture(scope="module")
def engine(onnx, uadtool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    done = uadtool("export", onnx["tensorrt", "int8"], "-o", folder / "int8.engine", "--compute-capability", "8.6",
                   "--workspace", 512, "--max-batch", 4, "--timing-cache", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "int8.engine", json.loads(done.stdout)


def test_an_engine_has_its_metadata_beside_it(engine, onnx):
    path, record = engine
    validate(record, "engine")
    assert json.loads((path.parent / "int8.engine.json").read_text()) == record
    assert record["digest"] == file_digest(path)
    assert record["onnx_digest"] == file_digest(onnx["tensorrt", "int8"])
    assert {name: record["build"][name] for name in ("package", "compute_capability", "precision", "workspace",
                                                     "max_batch", "dla", "gpu_fallback")} == {
        "package": "tensorrt_rtx", "compute_capability": "8.6", "precision": "int8", "workspace": 512, "max_batch": 4,
        "dla": None, "gpu_fallback": False}
    assert (path.parent / "cache").stat().st_size > 0
    metadata, build = read_engine_metadata(str(path))
    assert metadata == flavour("resnet18", "tensorrt", "int8").metadata
    assert build == record["build"]


class StaleCache:
    """A configuration that refuses caches of other versions, as TensorRT does and RTX does not."""

    def __init__(self, create):
        self.create_timing_cache, self.used = create, None

    def set_timing_cache(self, cache, ignore_mismatch):
        self.used = cache if not cache and not ignore_mismatch else None
        return self.used is not None


@pytest.mark.parametrize("create", [lambda content: content, lambda content: None if content else content])
def test_a_timing_cache_of_another_tensorrt_is_made_anew(create, tmp_path, caplog):
    config = StaleCache(create)
    assert _use_timing_cache(config, tmp_path / "missing") == config.used == b""
    assert not caplog.text
    (tmp_path / "old").write_bytes(b"of TensorRT 8.4")
    assert _use_timing_cache(config, tmp_path / "old") == config.used == b""
    assert "old is damaged or from another TensorRT or GPU" in caplog.text


def test_an_engine_without_its_metadata_is_refused(engine, tmp_path):
    path, record = engine
    alone = tmp_path / "alone.engine"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(UadtoolError, match=r"has no alone\.engine\.json beside it"):
        read_engine_metadata(str(alone))
    (tmp_path / "alone.engine.json").write_text(json.dumps(record))
    assert read_engine_metadata(str(alone))
    alone.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UadtoolError, match="belongs to another engine"):
        read_engine_metadata(str(alone))
    (tmp_path / "alone.engine.json").write_text(json.dumps({**record, "build": {}}))
    with pytest.raises(UadtoolError, match="is damaged: its build lacks package; export the engine again"):
        read_engine_metadata(str(alone))


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_the_compute_capability_is_required(onnx, uadtool, tmp_path):
    done = uadtool("export", onnx["tensorrt", "fp32"], "-o", tmp_path / "x.engine")
    assert done.returncode == 1
    assert "no GPU to build an engine for was found; run this on the device, or name its" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "options", "message"), [
    (("onnxruntime", "int8"), {}, "was quantized for onnxruntime, which TensorRT does not support"),
    (("tensorrt", "fp32"), {"compute_capability": "9.9"}, "cannot build for 9.9; it supports 12.0, .*8.6"),
    (("tensorrt", "fp32"), {"dla": 0}, "DLA core 0 does not exist; this device has 0"),
])
def test_what_cannot_be_built_is_refused(onnx, model, options, message):
    metadata = flavour("resnet18", *model).metadata
    with pytest.raises(UadtoolError, match=message):
        build_engine(str(onnx[model]), metadata, BuildOptions(**{"compute_capability": "8.6", **options}))


def test_a_graph_that_tensorrt_does_not_take_is_refused_with_the_node(onnx, tmp_path):
    damaged = tmp_path / "damaged.onnx"
    content = onnx["tensorrt", "fp32"].read_bytes()
    damaged.write_bytes(content.replace(b"MaxPool", b"MinPool"))
    with pytest.raises(UadtoolError, match=r"does not support .*damaged\.onnx: MinPool "):
        build_engine(str(damaged), flavour("resnet18", "tensorrt", "fp32").metadata,
                     BuildOptions(compute_capability="8.6"))


class Dla:
    """Builder, configuration and network of a device with two DLA cores, which run only convolutions."""

    num_DLA_cores = 2
    num_layers = 3

    def __init__(self):
        self.flags = []
        self.set_flag = self.flags.append

    def get_layer(self, index):
        return SimpleNamespace(name=("image_cast", "conv1", "score_topk")[index])

    def can_run_on_DLA(self, layer):
        return layer.name == "conv1"


class Layer:
    """A layer of TensorRT 8.5: its type, output type, and the names of its inputs and output."""

    precision = None

    def __init__(self, type, dtype="float", inputs=("x",), output="y", op=None):
        self.type, self.op, self.num_inputs = type, op, len(inputs)
        self.get_input = [SimpleNamespace(name=name) for name in inputs].__getitem__
        self.get_output = lambda index: SimpleNamespace(name=output, dtype=dtype)


class Typed:
    """A network and the configuration of its engine, where every precision is a flag."""

    def __init__(self, version):
        kinds = ("ELEMENTWISE", "UNARY", "REDUCE", "TOPK", "MATRIX_MULTIPLY", "DEQUANTIZE", "CONVOLUTION")
        flags = ("FP16", "INT8", "TF32", "OBEY_PRECISION_CONSTRAINTS")
        self.trt = SimpleNamespace(
            __name__="tensorrt", __version__=version, BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
            LayerType=SimpleNamespace(**{name: name for name in kinds}), IElementWiseLayer=Layer,
            DataType=SimpleNamespace(FLOAT="float", HALF="half"), ElementWiseOperation=SimpleNamespace(SUM="sum"))
        self.flags = {"TF32"}
        self.set_flag, self.clear_flag = self.flags.add, self.flags.discard
        self.layers = [
            Layer("DEQUANTIZE", output="codes"), Layer("CONVOLUTION", inputs=("codes",)),
            Layer("MATRIX_MULTIPLY", inputs=("codes", "w")), Layer("ELEMENTWISE", op="sum"), Layer("REDUCE", "half"),
            Layer("ELEMENTWISE", op="prod"), Layer("UNARY"), Layer("TOPK"), Layer("MATRIX_MULTIPLY")]
        self.num_layers, self.get_layer = len(self.layers), self.layers.__getitem__


@pytest.mark.parametrize(("version", "precision", "flags", "float_layers"), [
    ("8.5.2.2", "fp32", set(), []),
    ("8.5.2.2", "int8", {"INT8"}, []),
    ("8.5.2.2", "mixed", {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"}, [5, 6, 7, 8]),
    ("8.5.2.2", "fp16", {"FP16", "OBEY_PRECISION_CONSTRAINTS"}, [5, 6, 7, 8]),
    ("10.3.0", "mixed", set(), []), ("11.0.0", "fp16", set(), []),
])
def test_the_score_head_stays_fp32(version, precision, flags, float_layers):
    network = Typed(version)
    versions.use_types_of_graph(network.trt, network, network, precision)
    assert network.flags == flags
    assert [index for index, layer in enumerate(network.layers) if layer.precision == "float"] == float_layers


@pytest.mark.parametrize("detector", ["resnet18", pytest.param("duet", marks=pytest.mark.slow)])
def test_the_score_head_is_found_in_any_precision(detector):
    """In networks as a real importer makes them."""
    log, found = trt.Logger(trt.Logger.ERROR), []
    for precision in ("fp16", "mixed"):
        network = trt.Builder(log).create_network(0)
        assert trt.OnnxParser(network, log).parse(flavour(detector, "tensorrt", precision).proto.SerializeToString())
        found.append(Counter(layer.type for layer in versions.fp32_layers(trt, network)))
    assert found[0] == found[1]  # so none of it is of the networks
    assert set(found[0]) >= {trt.LayerType.ELEMENTWISE, trt.LayerType.UNARY, trt.LayerType.REDUCE, trt.LayerType.TOPK}


@pytest.mark.parametrize(("name", "version", "flags"), [
    ("tensorrt", "8.5.2.2", 1 << 0), ("tensorrt", "10.3.0", 1 << 1), ("tensorrt", "11.0.0", 0),
    ("tensorrt_rtx", "1.7", 0),
])
def test_tensors_have_the_types_of_the_graph(name, version, flags):
    module = SimpleNamespace(__name__=name, __version__=version, NetworkDefinitionCreationFlag=SimpleNamespace(
        EXPLICIT_BATCH=0, STRONGLY_TYPED=1))
    assert versions.create_network(module, SimpleNamespace(create_network=lambda flags: flags)) == flags


@pytest.fixture
def jetson():
    return SimpleNamespace(__name__="tensorrt", __version__="8.5.2.2", DeviceType=SimpleNamespace(DLA="dla"),
                           BuilderFlag=SimpleNamespace(GPU_FALLBACK="fallback"))


def test_layers_that_a_dla_cannot_run_are_reported(jetson):
    dla = Dla()
    found = _use_dla(jetson, dla, dla, dla, BuildOptions(dla=1, gpu_fallback=True), "fp16")
    assert found == ["image_cast", "score_topk"]
    assert (dla.default_device_type, dla.DLA_core, dla.flags) == ("dla", 1, ["fallback"])


@pytest.mark.parametrize(("options", "precision", "message"), [
    ({"dla": 2}, "fp16", "DLA core 2 does not exist; this device has 2"),
    ({"dla": 0}, "fp16", "cannot run 2 of 3 layers, first image_cast; let the GPU run them: --gpu-fallback"),
    ({"dla": 0, "gpu_fallback": True}, "int8", "does not support graphs with ranges in them .* give it the fp16 graph"),
])
def test_graphs_that_a_dla_does_not_support(jetson, options, precision, message):
    with pytest.raises(UadtoolError, match=message):
        _use_dla(jetson, Dla(), Dla(), Dla(), BuildOptions(**options), precision)


@pytest.mark.parametrize(("arguments", "message"), [
    (["model.onnx", "-o", "other.onnx"], "an .onnx file into an .engine file"),
    (["model.safetensors", "-o", "x.engine"], "an .onnx file into an .engine file"),
    (["model.safetensors", "-o", "x.onnx", "--dla", "0"], "--dla requires an .engine output"),
    (["model.onnx", "-o", "x.engine", "--images", "."], "check an engine with score"),
    (["model.onnx", "-o", "x.engine", "--gpu-fallback"], "--gpu-fallback requires --dla"),
])
def test_options_that_do_not_go_together(uadtool, tmp_path, arguments, message):
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).touch()
    model, _, output, *others = arguments
    done = uadtool("export", tmp_path / model, "-o", tmp_path / output, *others)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(("machine", "advice"), [("aarch64", "apt-get install python3-libnvinfer"),
                                                 ("x86_64", r"pip install 'uadtool\[tensorrt-rtx\]'")])
def test_without_tensorrt_the_install_line_is_that_of_the_machine(monkeypatch, machine, advice):
    monkeypatch.setattr(versions, "PACKAGES", ("tensorrt_of_nobody",))
    monkeypatch.setattr(versions.platform, "machine", lambda: machine)
    with pytest.raises(UadtoolError, match=advice) as raised:
        versions.import_tensorrt()
    assert raised.value.exit_code == 3
