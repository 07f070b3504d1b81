import json

import numpy as np
import onnx
import onnx_ir
import pytest
from flavours import FLAVOURS, flavour
from onnx import TensorProto, helper, numpy_helper

from uadtool.cli.export import export as command
from uadtool.errors import UadtoolError
from uadtool.lab import export
from uadtool.lab.models import save_model
from uadtool.lab.onnx_export.lint import lint
from uadtool.lab.onnx_export.writer import quantize_biases


@pytest.fixture
def proto():
    """A graph that TensorRT takes, to be spoilt; it has residual additions with one and with two convolutions."""
    copy = onnx.ModelProto()
    copy.CopyFrom(flavour("resnet18", "tensorrt", "int8").proto)
    return copy


def producer(graph, name):
    return next(node for node in graph.node if name in node.output)


def quantizers(proto):
    """The DQ of the weights, and pairs of Q and DQ of the activations."""
    graph, weights, pairs = proto.graph, [], []
    constants = {tensor.name for tensor in graph.initializer}
    for dequantize in (node for node in graph.node if node.op_type == "DequantizeLinear"):
        if dequantize.input[0] in constants:
            weights.append(dequantize)
        else:
            pairs.append((producer(graph, dequantize.input[0]), dequantize))
    return weights, pairs


def replace(proto, nodes, place, change):
    """Give these nodes another constant as input ``place``, made from what they have."""
    for node in nodes:
        (old,) = (tensor for tensor in proto.graph.initializer if tensor.name == node.input[place])
        node.input[place] = f"{node.output[0]}_{place}"
        proto.graph.initializer.append(numpy_helper.from_array(change(numpy_helper.to_array(old)), node.input[place]))


def additions(proto):
    """The residual ones: both inputs come from convolutions or quantizers."""
    return [node for node in proto.graph.node if node.op_type == "Add"
            and "DequantizeLinear" in [producer(proto.graph, name).op_type for name in node.input]]


def insert_quantizer(proto, node, place):
    pair, _ = quantizers(proto)[1][0]
    name = node.input[place]
    index = list(proto.graph.node).index(node)
    proto.graph.node.insert(index, helper.make_node("QuantizeLinear", [name, *pair.input[1:]], ["q"], name="q"))
    proto.graph.node.insert(index + 1, helper.make_node("DequantizeLinear", ["q", *pair.input[1:]], ["dq"], name="dq"))
    node.input[place] = "dq"


@pytest.mark.parametrize("target", [target for target, _ in FLAVOURS if target != "tensorrt"])
def test_other_flavours_fail(target):
    findings = lint(flavour("resnet18", target, "int8").proto)
    assert any(line.endswith("zero point is not 0; TensorRT only supports symmetric quantization") for line in findings)
    assert any("a bias is quantized" in line for line in findings) == (target == "onnxruntime")


def newer_opset(proto):
    proto.opset_import[0].version = 18


def unknown_operator(proto):
    next(node for node in proto.graph.node if node.op_type == "Sqrt").op_type = "LayerNormalization"


def transposed_uint8(proto):
    cast = next(node for node in proto.graph.node if node.op_type == "Cast")
    cast.op_type = "Transpose"


def part_of_a_shape(proto):
    node = next(node for node in proto.graph.node if node.op_type == "Resize")
    proto.graph.node.append(helper.make_node("Shape", [node.input[0]], ["count"], name="shape", end=1))


def nonzero_zero_point(proto):
    replace(proto, quantizers(proto)[1][0], 2, lambda zero: zero + np.int8(1))


def unsigned_codes(proto):
    replace(proto, quantizers(proto)[1][0], 2, lambda zero: zero.astype(np.uint8))


def no_zero_point(proto):
    quantizers(proto)[1][0][0].input.pop()


def computed_scale(proto):
    node = quantizers(proto)[1][0][0]
    proto.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def zero_scale(proto):
    replace(proto, quantizers(proto)[0][:1], 1, np.zeros_like)


def scales_of_activations(proto):
    replace(proto, quantizers(proto)[1][0], 1, lambda scale: np.repeat(scale, 3))


def scales_along_another_axis(proto):
    (axis,) = (attribute for attribute in quantizers(proto)[0][0].attribute if attribute.name == "axis")
    axis.i = 1


def too_few_scales(proto):
    replace(proto, quantizers(proto)[0][:1], 1, lambda scale: scale[:2])


def integer_biases(proto):
    model = onnx_ir.from_proto(proto)
    quantize_biases(model.graph)
    proto.CopyFrom(onnx_ir.to_proto(model))


def single_dequantizer(proto):
    proto.graph.node.insert(0, helper.make_node("Cast", ["image"], ["integers"], to=TensorProto.INT8))
    quantizers(proto)[1][0][1].input[0] = "integers"


def quantizer_after_the_last_convolution(proto):
    node = additions(proto)[0]
    place = next(place for place, name in enumerate(node.input) if producer(proto.graph, name).op_type == "Conv")
    insert_quantizer(proto, node, place)


def quantized_other_branch_of_two_convolutions(proto):
    """The quantizer of the shortcut's convolution moves to the last one, which is computed after it."""
    def first(graph, name):
        node = producer(graph, name)
        return first(graph, node.input[0]) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else node

    node = next(node for node in additions(proto)
                if {first(proto.graph, name).op_type for name in node.input} == {"Conv"})
    sources = [first(proto.graph, name).output[0] for name in node.input]
    place = max((0, 1), key=lambda i: list(proto.graph.node).index(producer(proto.graph, sources[i])))
    node.input[:] = sources
    insert_quantizer(proto, node, place)


def two_quantized_activations(proto):
    """An addition of what two activations gave."""
    node = additions(proto)[0]
    activated = next(name for name in node.input if producer(proto.graph, name).op_type == "DequantizeLinear")
    node.input[:] = [activated, activated + "_again"]
    source = producer(proto.graph, activated)
    proto.graph.node.insert(list(proto.graph.node).index(node), helper.make_node(
        "DequantizeLinear", source.input, [activated + "_again"], name="again"))


def quantizer_before_an_activation(proto):
    node = next(node for node in proto.graph.node if node.op_type == "Relu"
                and producer(proto.graph, node.input[0]).op_type == "Conv")
    insert_quantizer(proto, node, 0)


def float_weights(proto):
    dequantize = quantizers(proto)[0][0]
    node = next(node for node in proto.graph.node if dequantize.output[0] in node.input)
    shape = next(tensor.dims for tensor in proto.graph.initializer if tensor.name == dequantize.input[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), "floats"))
    node.input[1] = "floats"


def very_many_highest_values(proto):
    node = next(node for node in proto.graph.node if node.op_type == "TopK")
    replace(proto, [node], 1, lambda count: np.full_like(count, 3841))


@pytest.mark.parametrize(("spoil", "rule"), [
    (quantizer_before_an_activation, "a quantizer stands between a convolution and its activation"),
    (float_weights, "one of input and weights is quantized and the other is not"),
    (very_many_highest_values, "selects more than 3840 values, TensorRT's limit"),
    (newer_opset, "graph: opset is 18, not at most 17; TensorRT 8.5 cannot read newer opsets"),
    (unknown_operator, "operator LayerNormalization is not supported; TensorRT 8.5 cannot import it"),
    (transposed_uint8, "uint8 input is not cast first; TensorRT cannot compute with uint8"),
    (part_of_a_shape, "reads a part of the shape; the importer of TensorRT 8.5 reads all of it"),
    (nonzero_zero_point, "zero point is not 0; TensorRT only supports symmetric quantization"),
    (unsigned_codes, "codes are uint8; TensorRT only quantizes to signed integers"),
    (no_zero_point, "scale or zero point is not a constant"),
    (computed_scale, "scale or zero point is not a constant"),
    (zero_scale, "scale is not positive; TensorRT divides by it"),
    (scales_of_activations, "activations have a scale per channel; TensorRT scales activations per tensor only"),
    (scales_along_another_axis, "scales of weights are not along axis 0; TensorRT scales weights per output channel"),
    (too_few_scales, "scales of weights are not along axis 0"),
    (integer_biases, "a bias is quantized; TensorRT adds biases in float"),
    (single_dequantizer, "input does not come from QuantizeLinear; TensorRT requires the two in pairs"),
    (quantizer_after_the_last_convolution, "a quantizer stands between the last convolution and this addition"),
    (quantized_other_branch_of_two_convolutions, "a quantizer stands between the last convolution and this addition"),
    (two_quantized_activations, "both branches are quantized"),
])
def test_each_rule_finds_what_breaks_it_and_nothing_else(proto, spoil, rule):
    assert lint(proto) == []
    spoil(proto)
    findings = lint(proto)
    assert findings
    assert all(rule in line for line in findings), findings
    assert all(line.startswith(("node ", "graph: ")) for line in findings)
    if spoil is not integer_biases:
        assert len(findings) <= 2  # a Q and its DQ


def test_export_refuses_what_tensorrt_would(tmp_path, monkeypatch, capsys):
    made = flavour("resnet18", "tensorrt", "int8")
    save_model(made.model, made.metadata, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "model.onnx")]
    monkeypatch.setattr(export, "to_onnx", lambda *_: flavour("resnet18", "onnxruntime", "int8").proto)
    with pytest.raises(UadtoolError, match=r"TensorRT would refuse the exported graph: node .*: zero point is not 0; "
                                           "TensorRT only supports symmetric quantization; nothing was written"):
        command.main(arguments, standalone_mode=False)
    assert not (tmp_path / "model.onnx").exists()
    monkeypatch.undo()
    command.main(arguments, standalone_mode=False)
    record = json.loads(capsys.readouterr().out)
    assert (record["precision"], record["target"], record["opset"]) == ("int8", "tensorrt", 17)
    assert lint(onnx.load(tmp_path / "model.onnx")) == []
