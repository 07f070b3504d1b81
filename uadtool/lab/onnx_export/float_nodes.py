"""Names the nodes that compute in fp32, for versions of TensorRT in which tensors have no types.

Before version 10, a builder that may use fp16 uses it for any layer. The score head, attention and norms require fp32:
in fp16 squares overflow, small differences vanish, and the least distance (1e-24) becomes 0.
"""

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from uadtool.tensorrt.versions import FLOAT_MARK

FUSED = {"Add", "AveragePool", "Clip", "LeakyRelu", "MaxPool", "Relu", "Resize"}
"""Operators that integer kernels may compute between a quantized layer and the next quantizer."""
UNMARKED = {"Cast", "Constant", "DequantizeLinear", "QuantizeLinear", "Shape"}
"""Operators whose types the importer takes from the graph in all versions."""


def mark_float_nodes(proto: ModelProto) -> None:
    """Let the names of the nodes that compute in fp32 begin with ``FLOAT_MARK``, in place.

    Those of quantized layers, and of what such a layer may compute as well, stay as they are.
    """
    graph = onnx.shape_inference.infer_shapes(proto).graph
    floats = {value.name for value in (*graph.value_info, *graph.output)
              if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    quantized = quantized_nodes(proto.graph)
    for node in proto.graph.node:
        is_float = floats.intersection((*node.input, *node.output))  # ArgMin only reads floats
        if is_float and node.op_type not in UNMARKED and node.output[0] not in quantized:
            node.name = f"{FLOAT_MARK}{node.name or node.output[0]}"


def quantized_nodes(graph: GraphProto) -> set[str]:
    """The first outputs of quantized layers, and of what may be computed along with them."""
    constants = {tensor.name for tensor in graph.initializer}
    dequantized, found = set[str](), set[str]()

    def read(node: NodeProto) -> set[str]:
        return {name for name in node.input if name and name not in constants}

    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            dequantized.add(node.output[0])
        elif read(node) & dequantized or (node.op_type in FUSED and read(node) and read(node) <= found):
            found.add(node.output[0])
    return found
