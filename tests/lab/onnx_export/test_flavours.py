"""What is exported of every method: parity, our own lint, and TensorRT's parser and builder.

TensorRT-RTX builds ahead of time, without a GPU.
"""

from collections import Counter
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from flavours import DETECTORS, FAST, FLAVOURS, MATRIX, TENSORRT, flavour, operators, optimized
from onnx import numpy_helper

from uadtool.errors import UadtoolError
from uadtool.host import adds_int8_exactly
from uadtool.lab.onnx_export.deployed import EXPORT_PAYS, deployed_maps
from uadtool.lab.onnx_export.lint import lint
from uadtool.lab.onnx_export.parity import TOLERANCE, check_parity
from uadtool.lab.onnx_export.writer import save_onnx
from uadtool.lab.quantization.modules import QuantizedConv2d
from uadtool.runtimes.opening import open_model
from uadtool.tensorrt.builder import BuildOptions, build_engine

SM86 = "8.6"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_layers_share_no_zero_point(target):
    """ONNX Runtime needs that to compute exactly without VNNI."""
    graph = flavour("resnet18", target, "int8").proto.graph
    zero_points = [node.input[2] for node in graph.node if node.op_type == "DequantizeLinear"]
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    assert max(Counter(name for name in zero_points if name in vectors).values()) == 1


# TensorRT


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def exported(trt, tmp_path_factory):
    """The file of a flavour."""
    folder = tmp_path_factory.mktemp("onnx")

    def exported(detector, target, precision, batch=None):
        path = folder / f"{detector}-{target}-{precision}-{batch}.onnx"
        if not path.exists():
            proto = onnx.ModelProto()
            proto.CopyFrom(flavour(detector, target, precision).proto)
            for value in (*proto.graph.input, *proto.graph.output) if batch else ():
                value.type.tensor_type.shape.dim[0].dim_value = batch
            save_onnx(proto, path)
        return str(path)

    return exported


@pytest.mark.parametrize(("detector", "precision"), MATRIX)
def test_our_lint_passes_it(detector, precision):
    assert lint(flavour(detector, "tensorrt", precision).proto) == []


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize(("detector", "precision"), MATRIX)
def test_tensorrt_builds_an_engine(exported, detector, precision, batch):
    engine = build_engine(exported(detector, "tensorrt", precision, batch),
                          flavour(detector, "tensorrt", precision).metadata,
                          BuildOptions(compute_capability=SM86, max_batch=batch or 8))
    assert len(engine.plan) > 100_000
    assert engine.build["precision"] == ("int8" if precision == "mixed" else precision)


@pytest.mark.parametrize("precision", TENSORRT)
def test_tensorrt_sees_the_inputs_and_outputs_of_a_detector(trt, exported, precision):
    log = trt.Logger()
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(exported("resnet18", "tensorrt", precision))
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    assert {name: tensor.dtype for name, tensor in outputs.items()} == {
        "score": trt.float32, "raw_score": trt.float32, "anomaly_map": trt.float32, "nearest_class": trt.int32,
        "class_distance": trt.float32}
    assert network.get_input(0).dtype == trt.uint8
    assert network.get_input(0).shape[0] == -1


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.6), ("int8", 0.45)])
def test_engines_shrink_with_the_precision(exported, precision, share):
    sizes = [len(build_engine(exported("resnet18", "tensorrt", one), flavour("resnet18", "tensorrt", one).metadata,
                              BuildOptions(compute_capability=SM86)).plan) for one in ("fp32", precision)]
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_tensorrt_refuses_other_flavours(exported, target):
    metadata = flavour("resnet18", target, "int8").metadata.replace(target="tensorrt")  # so that it comes to the parser
    with pytest.raises(UadtoolError, match=r"does not support .*: \w+ .*: .*Non-zero zero point is not supported"):
        build_engine(exported("resnet18", target, "int8"), metadata, BuildOptions(compute_capability=SM86))


# The graph


def constants(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def convolution_weights(proto):
    """The constant, or what dequantizes it, of each convolution."""
    values, producers = constants(proto), {name: node for node in proto.graph.node for name in node.output}
    return [values.get(node.input[1], producers.get(node.input[1])) for node in proto.graph.node
            if node.op_type == "Conv"]


@pytest.mark.parametrize(("teacher", "target", "precision"), [
    *(("resnet18", *one) for one in FLAVOURS),
    *(pytest.param("tf_efficientnet_lite0", target, "int8", marks=pytest.mark.slow)
      for target in ("tensorrt", "onnxruntime"))])
def test_every_flavour_keeps_parity(teacher, target, precision):
    made = flavour(teacher, target, precision)
    onnx.checker.check_model(made.proto, full_check=True)
    assert [(o.domain, o.version) for o in made.proto.opset_import] == [("", 17)]
    parity = check_parity(made.model, made.proto, made.metadata, made.images)
    own = "openvino" if target == "openvino" and find_spec("openvino") and adds_int8_exactly() else "onnxruntime"
    assert parity["runtime"]["name"] == own
    assert parity["score_difference"] <= parity["tolerance"] == TOLERANCE[precision]


def test_half_precision_is_stored_and_computed_in_the_networks_alone():
    proto = flavour("resnet18", "tensorrt", "fp16").proto
    assert {weight.dtype for weight in convolution_weights(proto)} == {np.dtype(np.float16)}
    assert operators(proto)["Cast"] == 1 + 1 + 6 + 1  # the pixels to fp32 and fp16, feature maps, nearest class
    halves = {name for name, value in constants(proto).items() if value.dtype == np.float16}
    heads = {"ReduceMean", "ReduceSum", "Resize", "Sub", "Mul", "Div"}
    assert not [node for node in proto.graph.node if node.op_type in heads and halves.intersection(node.input)]
    assert proto.ByteSize() < 0.51 * flavour("resnet18", "tensorrt", "fp32").proto.ByteSize()


def test_float_layers_of_a_mixed_graph_are_in_half_precision():
    made = flavour("resnet18", "tensorrt", "mixed")
    kinds = Counter(weight.dtype.name if isinstance(weight, np.ndarray) else weight.op_type
                    for weight in convolution_weights(made.proto))
    floats = len(made.metadata.quantization.float_layers)
    assert kinds == {"float16": floats, "DequantizeLinear": 2 * 15 - floats}
    assert floats > 2


@pytest.mark.parametrize("teacher", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
                                     for name in DETECTORS])
def test_weights_are_stored_in_8_bits(teacher):
    made = flavour(teacher, "tensorrt", "int8")
    values, found = constants(made.proto), []
    for dequantize in convolution_weights(made.proto):
        if isinstance(dequantize, np.ndarray):
            assert dequantize.shape[1] == 1 < min(dequantize.shape[2:])  # the filter that smooths maps
            continue
        weight, _, zero_point = (values[name] for name in dequantize.input)
        assert (weight.dtype, zero_point.dtype, zero_point.any()) == (np.int8, np.int8, False)
        found.append(weight.tobytes())
    stored = [module.weight.numpy().tobytes() for module in made.model.modules() if isinstance(module, QuantizedConv2d)]
    assert sorted(found) == sorted(stored)


def beside_integer_networks(teacher, convolutions, folder):
    """The operators that ONNX Runtime runs, without those of two networks that it computes in integers."""
    count = optimized(flavour(teacher, "onnxruntime", "int8").proto, folder / "optimized.onnx")
    assert (count.pop("QLinearConv"), count.pop("QLinearAdd")) == (2 * convolutions, 2 * 6)
    assert (count["Conv"], count["Relu"], count["Clip"]) == (0, 0, 3)  # the score clips three norms
    assert count["QuantizeLinear"] == 1  # the image
    count.pop("MaxPool", None)  # of u8
    return count


def test_onnx_runtime_computes_the_networks_in_integers(tmp_path):
    assert beside_integer_networks("resnet18", 15, tmp_path)["TopK"] == 2


@pytest.mark.slow
def test_the_float_score_head_is_the_same_for_all_networks(tmp_path):
    assert (beside_integer_networks("resnet18", 15, tmp_path)
            == beside_integer_networks("tf_efficientnet_lite0", 33, tmp_path))


def test_onnx_runtime_looks_up_memories_in_integers(tmp_path):
    count = optimized(flavour("duet", "onnxruntime", "int8").proto, tmp_path / "optimized.onnx")
    assert count["MatMulIntegerToFloat"] == 3
    assert count["AveragePool"] == 2  # before memories; in integers they would be slower
    types = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer}
    banks = [node.input[0] for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type == "Gather"]
    assert sum(types[name] == onnx.TensorProto.INT8 for name in banks) == 2 * 3  # projections and banks


@pytest.mark.skipif(not find_spec("openvino") or not adds_int8_exactly(),
                    reason="openvino is not installed, or not chosen for int8 on this processor")
def test_openvino_looks_up_memories_in_integers(tmp_path):
    made = flavour("duet", "openvino", "int8")
    save_onnx(made.proto, tmp_path / "duet.onnx")
    model = open_model(str(tmp_path / "duet.onnx"), 1, "openvino")
    nodes = [node.get_rt_info() for node in model._compiled[1].get_runtime_model().get_ops()]
    types = Counter(node["runtimePrecision"].astype(str) for node in nodes
                    if node["layerType"].astype(str) == "MatMul")
    assert types == {"i8": 3, "f32": 3}  # products and projections


def test_a_quantized_model_gives_the_same_maps_in_torch_and_in_onnx_runtime():
    made = flavour("resnet18", "openvino", "int8")
    images = torch.from_numpy(made.images)
    with torch.inference_mode():
        (maps, classes), (exported_maps, exported_classes) = (
            deployed_maps(made.model, made.metadata, count)(images) for count in (EXPORT_PAYS - 1, EXPORT_PAYS))
    assert maps.shape == exported_maps.shape
    assert torch.equal(classes, exported_classes)
    torch.testing.assert_close(maps.mean((0, 2, 3)), exported_maps.mean((0, 2, 3)), rtol=0.01, atol=0)
    assert (maps - exported_maps).abs().mean() < 0.02 * maps.std()
