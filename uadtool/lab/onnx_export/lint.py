"""The rules of TensorRT's ONNX importer, 8.5 (JetPack 5) to 11, for graphs with explicit quantization.

The importer runs on the device; this module finds graphs that it would refuse, or run slowly, when they are written.
Sources: onnx-tensorrt, docs/operators.md and the importers of QuantizeLinear and DequantizeLinear
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
"""The operators that the importer of 8.5 supports."""


def lint(proto: ModelProto) -> list[str]:
    """The findings that TensorRT would refuse, a line "node NAME: rule; reason" each; empty if all is well."""
    graph = _Graph(proto.graph)
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    findings = []
    if opset > MAX_OPSET:
        findings.append(f"graph: opset is {opset}, not at most {MAX_OPSET}; TensorRT 8.5 cannot read newer opsets")
    for node in proto.graph.node:
        findings += [f"node {node.name or node.output[0]}: {finding}" for finding in _check_node(node, graph)]
    return findings


class _Graph:
    """Constants and producers by name."""

    def __init__(self, graph: GraphProto) -> None:
        self.constants: dict[str, NDArray[Any]] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.pixels = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
        self._producers: dict[str, tuple[int, NodeProto]] = {
            name: (place, node) for place, node in enumerate(graph.node) for name in node.output}

    def kind(self, name: str) -> str:
        """The operator that produces this tensor; "" for inputs and constants."""
        return self._producers[name][1].op_type if name in self._producers else ""

    def producer(self, name: str) -> NodeProto:
        return self._producers[name][1]

    def before_quantizers(self, name: str) -> str:
        """The tensor without the quantizers that produced this one."""
        while self.kind(name) in ("DequantizeLinear", "QuantizeLinear"):
            name = self.producer(name).input[0]
        return name

    def place(self, name: str) -> int:
        """Position of the producer in the order of execution."""
        return self._producers[name][0]


def _check_node(node: NodeProto, graph: _Graph) -> Iterator[str]:
    if node.op_type not in OPERATORS:
        yield f"operator {node.op_type} is not supported; TensorRT 8.5 cannot import it"
    if node.op_type == "Shape" and node.attribute:
        yield "reads a part of the shape; the importer of TensorRT 8.5 reads all of it"
    if node.op_type != "Cast" and graph.pixels.intersection(node.input):
        yield "uint8 input is not cast first; TensorRT cannot compute with uint8, only cast it"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _check_parameters(node, graph)
    if node.op_type == "DequantizeLinear" and graph.kind(node.input[0]) != "QuantizeLinear":
        values = graph.constants.get(node.input[0])
        if values is not None and values.dtype == np.int32:
            yield "a bias is quantized; TensorRT adds biases in float and dequantizes 8-bit types only"
        elif values is None:
            yield "input does not come from QuantizeLinear; TensorRT requires the two in pairs"
    if node.op_type in ("Relu", "Clip"):
        source = graph.before_quantizers(node.input[0])
        if source != node.input[0] and graph.kind(source) == "Conv":
            yield ("a quantizer stands between a convolution and its activation; its codes are spent on values that "
                   "the activation cuts off")
    if node.op_type == "Conv" and len({graph.kind(name) == "DequantizeLinear" for name in node.input[:2]}) > 1:
        yield "one of input and weights is quantized and the other is not; TensorRT computes that in float"
    if node.op_type == "TopK" and graph.constants.get(node.input[1], np.array(0)).max() > MOST_OF_TOP_K:
        yield f"selects more than {MOST_OF_TOP_K} values, TensorRT's limit"
    if node.op_type == "Add":
        yield from _check_addition(node, graph)


def _check_parameters(node: NodeProto, graph: _Graph) -> Iterator[str]:
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
        source = graph.producer(source).input[0]
    axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
    weights = graph.constants.get(source)
    if weights is None:
        if scale.size != 1:
            yield "activations have a scale per channel; TensorRT scales activations per tensor only"
    elif scale.size != 1 and (axis, scale.size) != (0, weights.shape[0]):
        yield "scales of weights are not along axis 0; TensorRT scales weights per output channel"


def _check_addition(node: NodeProto, graph: _Graph) -> Iterator[str]:
    """TensorRT adds the other branch of a residual block in integers while the last convolution computes."""
    sources = {name: graph.before_quantizers(name) for name in node.input}
    quantized = {name for name, source in sources.items() if name != source}
    convolved = [name for name, source in sources.items() if graph.kind(source) == "Conv"]
    last = max(convolved, key=lambda name: graph.place(sources[name]), default=None)
    if last in quantized:
        yield ("a quantizer stands between the last convolution and this addition; TensorRT cannot compute the two in "
               "one kernel")
    elif len(quantized) == 2:
        yield "both branches are quantized; TensorRT adds in float"
