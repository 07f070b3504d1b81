"""Names of the nodes that compute in fp32."""

from collections import Counter

import pytest
from flavours import FLAVOURS, MATRIX, flavour
from onnx import TensorProto, helper

from uadtool.lab.onnx_export.float_nodes import mark_float_nodes
from uadtool.tensorrt.versions import FLOAT_MARK

HEAD = {"ArgMin", "Clip", "Div", "Gather", "Max", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "Sqrt", "Sub", "TopK"}
"""Operators of the score head that no network of these detectors has in int8 or fp16."""


@pytest.mark.parametrize(("detector", "precision"), [case for case in MATRIX if case.values[1] != "fp32"])
def test_the_score_head_is_marked_and_quantized_layers_are_not(detector, precision):
    graph = flavour(detector, "tensorrt", precision).proto.graph
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    marked = Counter(node.op_type for node in graph.node if node.name.startswith(FLOAT_MARK))
    plain = Counter(node.op_type for node in graph.node
                    if not node.name.startswith(FLOAT_MARK) and not halves.intersection(node.input))
    assert marked.keys() >= {"ArgMin", "Sub", "Pow", "Sqrt", "Gather", "TopK", "Resize"}
    if detector != "tf_efficientnet_lite0":  # which has ReLU6
        assert not HEAD & plain.keys()
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        assert not (node.name.startswith(FLOAT_MARK) and dequantized.intersection(node.input)), node.name
    assert "Relu" not in marked


@pytest.mark.parametrize(("target", "precision"), FLAVOURS)
def test_only_graphs_for_tensorrt_are_marked(target, precision):
    graph = flavour("resnet18", target, precision).proto.graph
    marked = any(node.name.startswith(FLOAT_MARK) for node in graph.node)
    assert marked == (target == "tensorrt" and precision != "fp32")


def test_a_node_without_a_name_is_named_by_its_output():
    nodes = [helper.make_node("Sqrt", ["x"], ["root"]),
             helper.make_node("Cast", ["root"], ["y"], to=TensorProto.FLOAT16)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])])
    proto = helper.make_model(graph)
    mark_float_nodes(proto)
    assert [node.name for node in proto.graph.node] == [f"{FLOAT_MARK}root", ""]
