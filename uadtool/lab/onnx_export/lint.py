"""The rules of TensorRT's ONNX importer, 8.5 (JetPack 5) to 11, for graphs with explicit quantization.

The importer itself is where the device is; here a graph that it would refuse, or run slower than it could, is found
when it is written. Sources: onnx-tensorrt, docs/operators.md and the importers of QuantizeLinear and DequantizeLinear
(release 8.5); TensorRT developer guide, "Working with quantized types".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

MAX_OPSET = 17
MOST_OF_TOP_K = 3840

OPERATORS = frozenset((
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu",
    "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gemm",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GRU",
    "HardSigmoid", "HardSwish", "Identity", "If", "InstanceNormalization", "IsNaN", "LRN", "LSTM", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean",
    "MeanVarianceNormalization", "Min", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
    "ReverseSequence", "RoiAlign", "Round", "Scan", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape",
    "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth",
    "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu",
    "Unsqueeze", "Upsample", "Where", "Xor",
))
"""What the importer of 8.5 knows."""


def lint(proto: ModelProto) -> list[str]:
    """What TensorRT would not take, a line "node NAME: rule; reason" each; none when all is well."""
    graph = _Graph(proto.graph)
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    found = []
    if opset > MAX_OPSET:
        found.append(f"graph: opset is {opset}, not at most {MAX_OPSET}; TensorRT 8.5 reads no newer one")
    for node in proto.graph.node:
        found += [f"node {node.name or node.output[0]}: {finding}" for finding in _node(node, graph)]
    return found


class _Graph:
    """What is asked about names."""

    def __init__(self, graph: GraphProto) -> None:
        self.constants: dict[str, NDArray[Any]] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.pixels = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
        self._producers: dict[str, tuple[int, NodeProto]] = {
            name: (place, node) for place, node in enumerate(graph.node) for name in node.output}

    def kind(self, name: str) -> str:
        """The operator that makes this tensor; "" for inputs and constants."""
        return self._producers[name][1].op_type if name in self._producers else ""

    def node(self, name: str) -> NodeProto:
        return self._producers[name][1]

    def before_quantizers(self, name: str) -> str:
        """What the quantizers behind which this tensor comes, if there are any, read."""
        while self.kind(name) in ("DequantizeLinear", "QuantizeLinear"):
            name = self.node(name).input[0]
        return name

    def place(self, name: str) -> int:
        """Where in the order of execution it is made."""
        return self._producers[name][0]


def _node(node: NodeProto, graph: _Graph) -> Iterator[str]:
    if node.op_type not in OPERATORS:
        yield f"operator {node.op_type} is not supported; TensorRT 8.5 has no importer for it"
    if node.op_type == "Shape" and node.attribute:
        yield "asks for a part of the shape; the importer of TensorRT 8.5 takes the whole of it"
    if node.op_type != "Cast" and graph.pixels.intersection(node.input):
        yield "uint8 input is not cast first; TensorRT computes with no uint8, it only casts it"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _parameters(node, graph)
    if node.op_type == "DequantizeLinear" and graph.kind(node.input[0]) != "QuantizeLinear":
        values = graph.constants.get(node.input[0])
        if values is not None and values.dtype == np.int32:
            yield "a bias is quantized; TensorRT adds biases in float and dequantizes 8-bit types only"
        elif values is not None:
            yield "weights are stored as integers; TensorRT 8 takes float ones through QuantizeLinear only"
        else:
            yield "input does not come from QuantizeLinear; TensorRT wants the two in pairs"
    if node.op_type in ("Relu", "Clip"):
        source = graph.before_quantizers(node.input[0])
        if source != node.input[0] and graph.kind(source) == "Conv":
            yield ("a quantizer stands between a convolution and its activation; its codes go to values that the "
                   "activation cuts off")
    if node.op_type == "Conv" and len({graph.kind(name) == "DequantizeLinear" for name in node.input[:2]}) > 1:
        yield "one of input and weights is quantized and the other is not; TensorRT computes that in float"
    if node.op_type == "TopK" and graph.constants.get(node.input[1], np.array(0)).max() > MOST_OF_TOP_K:
        yield f"asks for more than {MOST_OF_TOP_K} values; TensorRT gives no more"
    if node.op_type == "Add":
        yield from _addition(node, graph)


def _parameters(node: NodeProto, graph: _Graph) -> Iterator[str]:
    if len(node.input) < 3 or not graph.constants.keys() >= set(node.input[1:]):
        yield "scale or zero point is not a constant; TensorRT needs both when it builds the engine"
        return
    scale, zero_point = (graph.constants[name] for name in node.input[1:])
    if zero_point.any():
        yield "zero point is not 0; TensorRT only supports symmetric quantization"
    elif zero_point.dtype == np.uint8:
        yield "codes are uint8; TensorRT only quantizes to signed integers"
    if not (scale > 0).all():
        yield "scale is not positive; TensorRT divides by it"
    source = node.input[0]
    if graph.kind(source) == "QuantizeLinear":
        source = graph.node(source).input[0]
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
    weights = graph.constants.get(source)
    if weights is None:
        if scale.size != 1:
            yield "activations have a scale per channel; TensorRT scales activations per tensor only"
    elif scale.size != 1 and (axis, scale.size) != (0, weights.shape[0]):
        yield "scales of weights are not along axis 0; TensorRT scales weights per output channel"


def _addition(node: NodeProto, graph: _Graph) -> Iterator[str]:
    """TensorRT adds the other branch of a residual block, in integers, while the last convolution computes."""
    sources = {name: graph.before_quantizers(name) for name in node.input}
    quantized = {name for name, source in sources.items() if name != source}
    convolved = [name for name, source in sources.items() if graph.kind(source) == "Conv"]
    last = max(convolved, key=lambda name: graph.place(sources[name]), default=None)
    if last in quantized:
        yield ("a quantizer stands between the last convolution and this addition; TensorRT could not compute the two "
               "in one kernel")
    elif len(quantized) == 2:
        yield "both branches are quantized; TensorRT adds in float"
