"""Weights as TensorRT 8 reads them."""

import contextlib
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from flavours import MATRIX, flavour, session
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from onnx import TensorProto, helper, numpy_helper

from uadtool.errors import UadtoolError
from uadtool.tensorrt import builder
from uadtool.tensorrt.driver import Gpu
from uadtool.tensorrt.weights import with_float_weights

INT8 = [case for case in MATRIX if case.values[1] in ("int8", "mixed")]


@pytest.mark.parametrize(("detector", "precision"), INT8)
def test_the_graph_computes_the_same(detector, precision):
    made = flavour(detector, "tensorrt", precision)
    changed = with_float_weights(made.proto.SerializeToString())
    proto = onnx.load_from_string(changed)
    onnx.checker.check_model(proto, full_check=True)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    quantized = {name for node in proto.graph.node if node.op_type == "QuantizeLinear" for name in node.output}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            assert node.input[0] in quantized
            assert node.input[0] not in constants
    assert len(constants) == len(made.proto.graph.initializer)
    assert proto.metadata_props == made.proto.metadata_props
    for found, expected in zip(*(session(model).run(None, {"image": made.images})
                                 for model in (changed, made.proto.SerializeToString()))):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("change", [bytes, with_float_weights])
def test_tensorrt_parses_both(change):
    trt = pytest.importorskip("tensorrt_rtx")
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse(change(flavour("resnet18", "tensorrt", "int8").proto.SerializeToString()))
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    weights = kinds.count(trt.LayerType.DEQUANTIZE) - kinds.count(trt.LayerType.QUANTIZE)
    assert weights == (30 if change is bytes else 0)


@pytest.mark.parametrize(("name", "version", "taken"), [
    ("tensorrt", "8.5.2.2", False), ("tensorrt", "8.6.2", False), ("tensorrt", "10.3.0", True),
    ("tensorrt_rtx", "1.7", True)])
def test_only_tensorrt_8_is_given_floats(monkeypatch, tmp_path, name, version, taken):
    """The builder stops at a parser that keeps what it is given."""
    given = []

    class Parser:
        num_errors = 0

        def __init__(self, network, logger):
            self.parse = given.append

    module = SimpleNamespace(
        __name__=name, __version__=version, OnnxParser=Parser, ILogger=object,
        ComputeCapability=SimpleNamespace(SM86=0),
        Builder=lambda logger: SimpleNamespace(create_network=lambda flags: None),
        NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1))
    monkeypatch.setattr(builder.versions, "import_tensorrt", lambda: module)
    monkeypatch.setattr(builder, "current_gpu", lambda: Gpu("Orin", "8.6", 16))
    made, path = flavour("resnet18", "tensorrt", "int8"), tmp_path / "model.onnx"
    onnx.save(made.proto, path)
    with pytest.raises(UadtoolError, match="does not support"):
        builder.build_engine(str(path), made.metadata, builder.BuildOptions())
    assert given == [path.read_bytes() if taken else with_float_weights(path.read_bytes())]


def test_other_graphs_stay_as_they_are():
    content = flavour("resnet18", "tensorrt", "fp32").proto.SerializeToString()
    assert onnx.load_from_string(with_float_weights(content)) == onnx.load_from_string(content)


def model_of(codes, scales):
    """A model that dequantizes these weights, twice."""
    initializers = {"codes": codes, "scales": scales, "zero": np.zeros(len(codes), np.int8)}
    nodes = [helper.make_node("DequantizeLinear", list(initializers), [name], axis=0) for name in ("weights", "again")]
    graph = helper.make_graph(
        nodes, "weights", [], [helper.make_tensor_value_info("weights", TensorProto.FLOAT, codes.shape)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@given(codes=stn.arrays(np.int8, (4, 9), elements=st.integers(-127, 127)),
       scales=stn.arrays(np.float32, 4, elements=st.floats(2 ** -26, 16, width=32)))
def test_weights_survive_the_way_through_floats(codes, scales):
    proto = onnx.load_from_string(with_float_weights(model_of(codes, scales)))
    assert [node.op_type for node in proto.graph.node] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
    proto.graph.output.append(helper.make_tensor_value_info("codes", TensorProto.INT8, codes.shape))
    weights, found = session(proto.SerializeToString()).run(None, {})
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(weights, codes * scales[:, None])


SMALL = model_of(np.ones((2, 3), np.int8), np.ones(2, np.float32))


@given(place=st.integers(0, len(SMALL) - 1), byte=st.integers(0, 255), end=st.integers(0, len(SMALL)))
def test_damage_is_a_value_error(place, byte, end):
    for damaged in (SMALL[:place] + bytes([byte]) + SMALL[place + 1:], SMALL[:end]):
        with contextlib.suppress(ValueError):
            with_float_weights(damaged)


def test_a_damaged_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(builder.versions, "takes_int8_constants", lambda trt: False)
    made, path = flavour("resnet18", "tensorrt", "int8"), tmp_path / "model.onnx"
    path.write_bytes(SMALL.replace(b"scales", b"others", 1))
    with pytest.raises(UadtoolError, match=r"model\.onnx is damaged: a DequantizeLinear lacks its scale: b'others'"):
        builder.build_engine(str(path), made.metadata, builder.BuildOptions(compute_capability="8.6"))


@pytest.mark.parametrize("damage", [
    b"\x3a\x05\x2a\x03\x42\x01", b"\x3a\x04\x2a\x02\x40\x01", b"\x3a\x04\x2a\x02\x12\x00"])
def test_what_is_not_a_model_is_a_value_error(damage):
    with pytest.raises(ValueError, match=r"ends too early|wrong types"):
        with_float_weights(damage)
