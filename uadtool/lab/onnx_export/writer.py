"""From a detector in torch to a complete ONNX detector: graph, integers as its target wants them, metadata."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.quantization.targets import TARGETS
from uadtool.metadata import KEY, Metadata

OPSET = 17
"""TensorRT 8.5 (JetPack 5) reads no newer one."""
EXPORTER_OPSET = 18
"""The exporter of torch writes no older one."""
IR_VERSION = 8
"""The oldest that holds opset 17: ONNX Runtime 1.12 and later read it."""


def to_onnx(model: nn.Module, metadata: Metadata) -> ModelProto:
    """The complete detector: ``image`` uint8 [N, H, W, 3] -> the tensors of ``OutputTensors``; any N.

    Raises:
        UadtoolError: the exporter of torch made something else, which a newer or older torch may.
    """
    height, width = metadata.image_size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    # The exporter reports its steps on stdout and warns of its own deprecations.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=EXPORTER_OPSET, external_data=False, verbose=False,
            input_names=["image"], output_names=list(OutputTensors._fields),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )
    assert program is not None
    proto = program.model_proto
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    if opset != EXPORTER_OPSET:
        raise UadtoolError(f"torch {torch.__version__} wrote opset {opset} instead of {EXPORTER_OPSET}")
    lower_opset(proto)
    scale_by_constants(proto)
    slice_shapes(proto.graph)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "uadtool", metadata.tool_version
    _strip(proto)
    _cast_first(proto.graph)
    if metadata.target is not None:
        target = TARGETS[metadata.target]
        if target.integer_bias:
            quantize_biases(proto.graph)
        if target.weight_quantizers:
            add_weight_quantizers(proto.graph)
    _remove_unused_constants(proto.graph)
    proto.metadata_props.add(key=KEY, value=metadata.to_json())
    return proto


def save_onnx(proto: ModelProto, path: Union[str, Path]) -> None:
    """Check the graph and write it, whole or not at all.

    Raises:
        UadtoolError: onnx's checker refuses it.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UadtoolError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    with atomic_write(path) as temporary:
        onnx.save_model(proto, temporary)


def lower_opset(proto: ModelProto) -> None:
    """From opset 18 to 17, where a reduction has its axes as attribute and Resize and Split do not know what 18 added.

    Nothing is lost: what 18 added has its default value, or says what 17 does anyway (equal parts). Any other operator
    that 18 changed is left to the checker of ``save_onnx``. The converters of onnx and torch fail at the first two.
    """
    constants = _constants(proto.graph)
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":  # which has had the input since 13
            _remove_attributes(node, "noop_with_empty_axes")
            if len(node.input) > 1:
                node.attribute.append(helper.make_attribute("axes", constants[node.input.pop()].tolist()))
        elif node.op_type == "Resize":
            _remove_attributes(node, "antialias", "keep_aspect_ratio_policy")
        elif node.op_type == "Split":
            _remove_attributes(node, "num_outputs")
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", OPSET))


def scale_by_constants(proto: ModelProto) -> None:
    """Let each Resize have factors instead of a size that is made from the batch's; the exporter's shapes are used.

    Factors are known when an engine is built.
    """
    shapes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
              for value in (*proto.graph.value_info, *proto.graph.input)}
    for node in proto.graph.node:
        if node.op_type == "Resize" and len(node.input) == 4:
            before, after = (shapes[name][2:] for name in (node.input[0], node.output[0]))
            name = f"{node.output[0]}_scales"
            proto.graph.initializer.append(numpy_helper.from_array(
                np.array([1, 1, *map(_scale, before, after)], np.float32), name))
            node.input[2:] = [name]
    _remove_unused_nodes(proto.graph)


def slice_shapes(graph: GraphProto) -> None:
    """Let Slice take the part that Shape is asked for: the importer of TensorRT 8.5 gives the whole shape."""
    for node in list(graph.node):
        asked = {a.name: a.i for a in node.attribute}
        if node.op_type != "Shape" or not asked:
            continue
        del node.attribute[:]
        start, end = asked.get("start", 0), asked.get("end")
        if (start, end) == (0, None):
            continue
        part, whole = node.output[0], f"{node.output[0]}_whole"
        names = [f"{part}_start", f"{part}_end"]
        for name, value in zip(names, (start, np.iinfo(np.int32).max if end is None else end)):
            graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        node.output[0] = whole
        graph.node.insert(list(graph.node).index(node) + 1,
                          helper.make_node("Slice", [whole, *names], [part], name=f"{node.name}_slice"))


def quantize_biases(graph: GraphProto) -> None:
    """Write the bias of each convolution between quantized tensors as s32, in units of input scale x weight scale.

    That is the form in which ONNX Runtime fuses Q/DQ and Conv to QLinearConv. Nothing is lost: quantization rounded
    the bias to these units (``QuantizedConv2d.round_bias``).
    """
    constants = _constants(graph)
    producers = {name: node for node in graph.node for name in node.output}
    for node in list(graph.node):
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        values, weight = (producers.get(name, node) for name in node.input[:2])
        if {values.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        scale = constants[values.input[1]].astype(np.float64) * constants[weight.input[1]].astype(np.float64)
        limits = np.iinfo(np.int32)
        codes = np.clip(np.rint(constants[node.input[2]] / scale), limits.min, limits.max).astype(np.int32)
        stem = f"{node.output[0]}_bias"
        graph.initializer.extend([numpy_helper.from_array(codes, f"{stem}_quantized"),
                                  numpy_helper.from_array(scale.astype(np.float32), f"{stem}_scale"),
                                  numpy_helper.from_array(np.zeros(len(codes), np.int32), f"{stem}_zero_point")])
        dequantize = helper.make_node(
            "DequantizeLinear", [f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"], [f"{stem}_dequantized"],
            name=f"{stem}_dequantize", axis=0)
        graph.node.insert(list(graph.node).index(node), dequantize)
        node.input[2] = f"{stem}_dequantized"


def add_weight_quantizers(graph: GraphProto) -> None:
    """Store s8 weights as the floats that they stand for, before a QuantizeLinear that gives just these codes.

    TensorRT 8 takes no s8 constant. Its engine holds s8 weights all the same.
    """
    constants = _constants(graph)
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            continue
        name, scale, zero_point = node.input
        codes = constants[name]
        values = codes.astype(np.float32) * constants[scale].reshape(-1, *[1] * (codes.ndim - 1))
        graph.initializer.append(numpy_helper.from_array(values, f"{name}_float"))
        quantize = helper.make_node("QuantizeLinear", [f"{name}_float", scale, zero_point], [f"{name}_quantized"],
                                    name=f"{name}_quantize", axis=0)
        graph.node.insert(list(graph.node).index(node), quantize)
        node.input[0] = f"{name}_quantized"


def _scale(before: int, after: int) -> np.float32:
    """The least factor of float32 of which a runtime, rounding down, gets this size."""
    scale = np.float32(after / before)
    return scale if float(scale) * before >= after else np.nextafter(scale, np.float32(np.inf))


def _constants(graph: GraphProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _remove_attributes(node: NodeProto, *names: str) -> None:
    for attribute in [a for a in node.attribute if a.name in names]:
        node.attribute.remove(attribute)


def _cast_first(graph: GraphProto) -> None:
    """Let who asks for the image's shape ask its cast: TensorRT takes uint8 for a Cast alone."""
    (image,) = (value.name for value in graph.input)
    asking = [node for node in graph.node if node.op_type == "Shape" and node.input[0] == image]
    if asking:
        cast = next(node for node in graph.node if node.op_type == "Cast" and node.input[0] == image)
        for node in asking:
            node.input[0] = cast.output[0]
        first = NodeProto()
        first.CopyFrom(cast)
        graph.node.remove(cast)
        graph.node.insert(0, first)


def _remove_unused_nodes(graph: GraphProto) -> None:
    used = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)


def _remove_unused_constants(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    unused: list[TensorProto] = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


def _strip(proto: ModelProto) -> None:
    """Remove what the exporter notes for debugging: stack traces with paths of this machine, as large as weights."""
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    del proto.metadata_props[:]
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
