"""`export MODEL.onnx -o MODEL.engine`: files, options and refusals."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import validate
from flavours import MATRIX, flavour

from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.lab.onnx_export.writer import save_onnx
from uadtool.tensorrt import builder, versions
from uadtool.tensorrt.builder import BuildOptions, _use_dla, _use_timing_cache, build_engine
from uadtool.tensorrt.driver import Gpu, current_gpu
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
                   "--workspace", 512, "--max-batch", 4, "--optimal-batch", 2, "--timing-cache", folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "int8.engine", json.loads(done.stdout)


def test_an_engine_has_its_metadata_beside_it(engine, onnx):
    path, record = engine
    validate(record, "engine")
    assert json.loads((path.parent / "int8.engine.json").read_text()) == record
    assert record["digest"] == file_digest(path)
    assert record["onnx_digest"] == file_digest(onnx["tensorrt", "int8"])
    assert {name: record["build"][name] for name in ("package", "compute_capability", "precision", "workspace",
                                                     "max_batch", "optimal_batch", "dla", "gpu_fallback")} == {
        "package": "tensorrt_rtx", "compute_capability": "8.6", "precision": "int8", "workspace": 512, "max_batch": 4,
        "optimal_batch": 2, "dla": None, "gpu_fallback": False}
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
    assert ("no GPU to build an engine for was found; run this on the device, or name its compute capability, one of "
            "7.5, 8.0, 8.6, ") in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "options", "message"), [
    (("onnxruntime", "int8"), {}, "was quantized for onnxruntime, which TensorRT does not support"),
    (("tensorrt", "fp32"), {"compute_capability": "9.9"}, "cannot build for 9.9; it supports 7.5, .*8.6.* 12.0"),
    (("tensorrt", "fp32"), {"compute_capability": "8"}, "cannot build for 8; it supports"),
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


@pytest.mark.parametrize(("gpu", "message"), [
    (Gpu("NVIDIA H200", "9.0", 132), r"RTX \S+ cannot build for this NVIDIA H200, which has 9\.0; it supports 7\.5, "),
    (None, "no GPU to build an engine for was found; run this on the device, or name its compute capability"),
])
def test_a_gpu_that_tensorrt_rtx_does_not_support_is_refused_before_the_build(onnx, monkeypatch, gpu, message):
    monkeypatch.setattr(builder, "current_gpu", lambda: gpu)
    monkeypatch.setattr(trt, "Builder", None)
    model = "tensorrt", "fp32"
    with pytest.raises(UadtoolError, match=message):
        build_engine(str(onnx[model]), flavour("resnet18", *model).metadata, BuildOptions())


def test_a_driver_that_does_not_suit_tensorrt(onnx, monkeypatch):
    """TensorRT 8.5 without a driver raises this."""
    def builder(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", builder)
    model = "tensorrt", "fp32"
    with pytest.raises(UadtoolError, match=r"cannot use the GPU; check that its driver is new enough for this version"):
        build_engine(str(onnx[model]), flavour("resnet18", *model).metadata, BuildOptions(compute_capability="8.6"))


@pytest.fixture
def seen(monkeypatch):
    """What builders are given: the batches of the profile, and of the network."""
    seen = {}
    build, set_shape = trt.Builder.build_serialized_network, trt.IOptimizationProfile.set_shape

    def noted_shape(profile, name, *shapes):
        seen["profile"] = [shape[0] for shape in shapes]
        return set_shape(profile, name, *shapes)

    def noted_network(builder, network, config):
        tensors = [network.get_input(0), *(network.get_layer(index).get_output(0)
                                           for index in range(network.num_layers))]
        seen["batch"], seen["variable"] = tensors[0].shape[0], sum(-1 in tuple(tensor.shape) for tensor in tensors)
        return build(builder, network, config)

    monkeypatch.setattr(trt.IOptimizationProfile, "set_shape", noted_shape)
    monkeypatch.setattr(trt.Builder, "build_serialized_network", noted_network)
    return seen


@pytest.mark.parametrize(("options", "batches"), [
    ({}, [1, 1, 8]), ({"optimal_batch": 16, "max_batch": 64}, [1, 16, 64]),
    ({"optimal_batch": 4, "max_batch": 2}, [1, 2, 2]),
])
def test_an_engine_is_fastest_for_single_images_unless_told_otherwise(onnx, seen, options, batches):
    model = "tensorrt", "fp32"
    build_engine(str(onnx[model]), flavour("resnet18", *model).metadata,
                 BuildOptions(compute_capability="8.6", **options))
    assert seen["profile"] == batches
    assert seen["batch"] == -1
    assert seen["variable"]


def test_a_dla_is_asked_about_layers_of_fixed_shape(onnx, seen, monkeypatch):
    """The importer is real; the core runs everything whose shape is fixed."""
    def use(trt, tensorrt_builder, network, config, options, precision):
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        return [layer.name for layer in layers if -1 in tuple(layer.get_output(0).shape)]

    monkeypatch.setattr(builder, "_use_dla", use)
    model = "tensorrt", "fp32"
    engine = build_engine(str(onnx[model]), flavour("resnet18", *model).metadata,
                          BuildOptions(compute_capability="8.6", dla=0, max_batch=2))
    assert (engine.build["dla_fallback"], engine.build["optimal_batch"]) == ([], 2)
    assert seen == {"batch": 2, "variable": 0}  # and no profile


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
    """A layer of TensorRT 8.5: its name, type, and the type of its input and output."""

    precision = output_type = None
    num_outputs = 1

    def __init__(self, name, type, dtype="float"):
        self.name, self.type = name, type
        self.get_input = self.get_output = lambda index: SimpleNamespace(dtype=dtype)

    def set_output_type(self, index, dtype):
        self.output_type = dtype


class Typed:
    """A network and the configuration of its engine, where every precision is a flag."""

    def __init__(self, version, *layers):
        flags = ("FP16", "INT8", "TF32", "OBEY_PRECISION_CONSTRAINTS")
        sources = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "JIT_CONVOLUTIONS": 4}
        self.trt = SimpleNamespace(
            __name__="tensorrt", __version__=version, BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
            LayerType=SimpleNamespace(QUANTIZE="quantize", CONSTANT="constant", SHAPE="shape"),
            DataType=SimpleNamespace(FLOAT="float", HALF="half"), TacticSource=SimpleNamespace(**sources))
        if version.startswith("8"):
            self.trt.PreviewFeature = SimpleNamespace(DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805="own")
        self.flags, self.features, self.sources = {"TF32"}, {}, 0b10111
        self.set_flag, self.clear_flag = self.flags.add, self.flags.discard
        self.set_preview_feature = self.features.__setitem__
        self.get_tactic_sources = lambda: self.sources
        self.layers = layers
        self.num_layers, self.get_layer = len(layers), layers.__getitem__

    def set_tactic_sources(self, sources):
        self.sources = sources


NETWORK = {"quantize": ("quantizer", "quantize", "int8"), "conv": ("node_conv", "convolution"),
           "half": ("node_cast", "identity", "half"), "constant": ("mean", "constant"),
           "added constant": ("(Unnamed Layer* 3) [Constant]", "constant"),
           "added": ("ONNXTRT_Broadcast_7", "shuffle"), "square": ("fp32/node_pow", "elementwise"),
           "index": ("(Unnamed Layer* 9) [Shuffle]", "shuffle", "int32"), "gather": ("fp32/node_gather", "gather"),
           "last": ("(Unnamed Layer* 11) [Shuffle]", "shuffle")}


@pytest.mark.parametrize(("version", "without", "flags"), [
    ("8.5.2.2", ("quantize", "half"), set()),  # fp32
    ("8.5.2.2", ("half",), {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"}),
    ("8.6.2", (), {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS"}),  # int8 with fp16 casts, as that of duet
    ("8.5.2.2", ("quantize",), {"FP16", "OBEY_PRECISION_CONSTRAINTS"}),
    ("10.3.0", (), set()), ("11.0.0", (), set()),
])
def test_flags_are_those_of_the_graphs_types_and_fp32_stays_fp32(version, without, flags):
    layers = {name: Layer(*layer) for name, layer in NETWORK.items() if name not in without}
    network = Typed(version, *layers.values())
    versions.use_types_of_graph(network.trt, network, network)
    assert network.flags == flags
    floats = [name for name, layer in layers.items() if layer.precision == "float"]
    assert floats == [name for name, layer in layers.items() if layer.output_type == "float"]
    assert floats == (["added", "square", "gather"] if flags else [])


def test_a_graph_without_names_of_fp32_layers_is_refused():
    network = Typed("8.5.2.2", Layer("node_quantize", "quantize", "int8"), Layer("node_pow", "elementwise"))
    with pytest.raises(UadtoolError, match="an earlier version exported it; export it again"):
        versions.use_types_of_graph(network.trt, network, network)


@pytest.mark.parametrize(("version", "features", "sources"), [
    ("8.5.2.2", {"own": True}, 0b10000), ("10.3.0", {}, 0b10111)])
def test_tensorrt_8_does_without_cudnn_and_cublas(version, features, sources):
    network = Typed(version)
    versions.use_own_kernels(network.trt, network)
    assert (network.features, network.sources) == (features, sources)


@pytest.mark.parametrize(("detector", "precision"), [case for case in MATRIX if case.values[1] != "fp32"])
def test_the_layers_of_an_importer_have_the_names_of_their_nodes(detector, precision):
    """In networks as a real importer makes them."""
    proto = flavour(detector, "tensorrt", precision).proto
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(proto.SerializeToString())
    found = versions.fp32_layers(trt, network)
    kinds = Counter(layer.type for layer in found)
    marked = {node.name for node in proto.graph.node if node.name.startswith(versions.FLOAT_MARK)}
    assert {layer.name for layer in found if not layer.name.startswith(versions.ADDED)} == marked
    assert {trt.LayerType.RESIZE, trt.LayerType.GATHER, trt.LayerType.TOPK, trt.LayerType.REDUCE} <= kinds.keys()
    assert trt.LayerType.CONSTANT not in kinds


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


@pytest.mark.parametrize(("version", "hint"), [
    ("10.7.0", ""), ("11.3.0", "; after TensorRT 10.7 only 11.4.1 and later")])
def test_versions_that_have_no_dla_are_named(jetson, version, hint):
    jetson.__version__ = version
    with pytest.raises(UadtoolError, match=f"DLA core 3 does not exist; this device has 2{hint}") as raised:
        _use_dla(jetson, Dla(), Dla(), Dla(), BuildOptions(dla=3), "fp16")
    assert str(raised.value).endswith("2") == (not hint)


@pytest.mark.parametrize(("arguments", "message"), [
    (["model.onnx", "-o", "other.onnx"], "an .onnx file into an .engine file"),
    (["model.safetensors", "-o", "x.engine"], "an .onnx file into an .engine file"),
    (["model.safetensors", "-o", "x.onnx", "--dla", "0"], "--dla requires an .engine output"),
    (["model.onnx", "-o", "x.engine", "--images", "."], "check an engine with score"),
    (["model.onnx", "-o", "x.engine", "--gpu-fallback"], "--gpu-fallback requires --dla"),
    (["model.onnx", "-o", "x.engine", "--optimal-batch", "9"], "--optimal-batch exceeds --max-batch"),
    (["model.onnx", "-o", "x.engine", "--optimal-batch", "2", "--dla", "0"], "leave out --optimal-batch"),
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
