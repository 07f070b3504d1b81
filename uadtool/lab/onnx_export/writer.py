"""From a detector in torch to a complete ONNX detector: graph, integers as its target requires them, metadata."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.onnx_export.float_nodes import mark_float_nodes
from uadtool.lab.quantization.targets import TARGETS
from uadtool.metadata import KEY, Metadata

OPSET = 17
"""The newest that TensorRT 8.5 (JetPack 5) reads."""
EXPORTER_OPSET = 18
"""The oldest that the exporter of torch writes."""
TRACED_BATCH = 13
"""Images with which the exporter runs the model: a number that no other dimension has."""
IR_VERSION = 8
"""The oldest that allows opset 17; ONNX Runtime reads it from 1.12 on."""


def to_onnx(model: nn.Module, metadata: Metadata) -> onnx.ModelProto:
    """The complete detector: ``image`` uint8 [N, H, W, 3] -> the tensors of ``OutputTensors``; any N.

    The number of images may only be the first dimension of a tensor, or a factor of it; ``check_parity`` finds out.

    Raises:
        UadtoolError: the installed torch writes another opset.
    """
    height, width = metadata.image_size
    example = torch.zeros(TRACED_BATCH, height, width, 3, dtype=torch.uint8)
    with _silence():
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=EXPORTER_OPSET, external_data=False, verbose=False,
            optimize=False, input_names=["image"], output_names=list(OutputTensors._fields))
        assert program is not None
        scale_by_constants(program.model.graph)
        free_batch(program.model.graph)  # before constants are folded for this number of images
        program.optimize()
    exported = program.model
    if exported.opset_imports[""] != EXPORTER_OPSET:
        raise UadtoolError(f"torch {torch.__version__} wrote opset {exported.opset_imports['']} instead of "
                           f"{EXPORTER_OPSET}")
    graph = exported.graph
    infer_batch(graph)
    lower_opset(exported)
    if metadata.target is not None:
        target = TARGETS[metadata.target]
        add_zero_points(graph)
        if target.integer_bias:
            quantize_biases(graph)
    RemoveUnusedNodesPass()(exported)
    _strip(exported)
    exported.ir_version = IR_VERSION
    exported.producer_name, exported.producer_version = "uadtool", metadata.tool_version
    exported.metadata_props[KEY] = metadata.to_json()
    proto = onnx_ir.to_proto(exported)
    if metadata.target is not None and TARGETS[metadata.target].half:
        mark_float_nodes(proto)
    del proto.graph.value_info[:]
    return proto


def save_onnx(proto: onnx.ModelProto, path: Union[str, Path]) -> None:
    """Check the graph and write it, whole or not at all.

    Raises:
        UadtoolError: onnx's checker refuses the graph.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UadtoolError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    with atomic_write(path) as temporary:
        onnx.save_model(proto, temporary)


def lower_opset(model: onnx_ir.Model) -> None:
    """From opset 18 to 17, which has the axes of reductions as attributes, and fewer attributes of Resize and Split.

    Nothing is lost: the attributes that 18 added have their default values, or say what 17 does anyway (equal parts).
    Any other operator that 18 changed is left to the checker of ``save_onnx``. The converters of onnx and torch fail on
    Reduce and Resize.
    """
    for node in model.graph:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":  # which has had the input since 13
            node.attributes.pop("noop_with_empty_axes", None)
            if len(node.inputs) > 1:
                node.attributes["axes"] = onnx_ir.AttrInt64s("axes", _constant(node, 1).tolist())
                node.resize_inputs(1)
        elif node.op_type == "Resize":
            node.attributes.pop("antialias", None)
            node.attributes.pop("keep_aspect_ratio_policy", None)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET


def scale_by_constants(graph: onnx_ir.Graph) -> None:
    """Give each Resize factors, which are known when an engine is built, instead of a size computed from the batch."""
    for node in graph:
        if node.op_type == "Resize" and len(node.inputs) == 4:
            values: list[Any] = [node.inputs[0], node.outputs[0]]
            before, after = (value.shape[2:] for value in values)
            scales = np.array([1, 1, *map(_scale, before, after)], np.float32)
            node.resize_inputs(3)
            node.replace_input_with(2, _add_constant(graph, f"{node.outputs[0].name}_scales", scales))


def free_batch(graph: onnx_ir.Graph) -> None:
    """Let a graph of ``TRACED_BATCH`` images take any number, as far as shapes are known before it is optimized.

    With a symbolic number of images the exporter takes twice as long, and computes shapes in the graph.
    """
    (image,) = graph.inputs
    for node in graph:
        if node.op_type == "Expand" and (shape := _static(node.outputs[0])):
            before = _static(node.inputs[0])
            if len(before) == len(shape) and before[0] == shape[0]:
                size = _add_constant(graph, f"{node.outputs[0].name}_size", np.array([1, *shape[1:]]))
                node.replace_input_with(1, size)
            elif shape[0] == TRACED_BATCH:
                node.replace_input_with(1, _shape_of_batch(graph, node, image, shape[1:]))
    infer_batch(graph)
    for node in graph:  # by the number of images constants would be folded
        for value in node.outputs:
            if value.shape:
                value.shape = onnx_ir.Shape([None, *value.shape[1:]])


def infer_batch(graph: onnx_ir.Graph) -> None:
    """Let each Reshape infer its first dimension, a multiple of the number of images, which inputs and outputs name."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        size: Any = node.inputs[1]
        known = [] if size.const_value is None else size.const_value.numpy().tolist()
        shape = _static(node.outputs[0]) or known
        if shape and known[:1] != [-1] and -1 not in shape[1:]:
            sizes = np.array([-1, *shape[1:]])
            node.replace_input_with(1, _add_constant(graph, f"{node.outputs[0].name}_size", sizes))
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape(["batch", *_static(value)[1:]])


def _static(value: Optional[onnx_ir.Value]) -> list[Any]:
    """The sizes of a tensor; none if they are not known."""
    return list(value.shape) if value and value.shape else []


def _shape_of_batch(graph: onnx_ir.Graph, before: onnx_ir.Node, image: onnx_ir.Value, rest: list[int]
                    ) -> onnx_ir.Value:
    """A shape whose first dimension is the number of images, computed before a node."""
    name = f"{before.outputs[0].name}_size"
    cast = next(node for node in image.consumers() if node.op_type == "Cast")  # TensorRT only casts uint8
    bounds = [_add_constant(graph, f"{name}_{word}", np.array([place])) for word, place in (("start", 0), ("end", 1))]
    whole = onnx_ir.node("Shape", [cast.outputs[0]], name=f"{name}_image")
    batch = onnx_ir.node("Slice", [whole.outputs[0], *bounds], name=f"{name}_batch")
    sizes = [batch.outputs[0], _add_constant(graph, f"{name}_rest", np.array(rest))]
    joined = onnx_ir.node("Concat", sizes, {"axis": 0}, name=name)
    for node in (whole, batch, joined):
        node.outputs[0].name = f"{node.name}_value"
        graph.insert_before(before, node)
    return joined.outputs[0]


def quantize_biases(graph: onnx_ir.Graph) -> None:
    """Write the bias of each convolution between quantized tensors as s32, in units of input scale x weight scale.

    In this form ONNX Runtime fuses Q/DQ and Conv to QLinearConv. Nothing is lost: quantization rounded the bias to
    these units (``QuantizedConv2d.round_bias``).
    """
    limits = np.iinfo(np.int32)
    for node in graph:
        if node.op_type != "Conv" or len(node.inputs) < 3:
            continue
        values, weight = (value.producer() if value else None for value in node.inputs[:2])
        if not (values and weight and values.op_type == weight.op_type == "DequantizeLinear"):
            continue
        scale = _constant(values, 1).astype(np.float64) * _constant(weight, 1).astype(np.float64)
        codes = np.clip(np.rint(_constant(node, 2) / scale), limits.min, limits.max).astype(np.int32)
        stem = f"{node.outputs[0].name}_bias"
        inputs = [_add_constant(graph, f"{stem}_quantized", codes),
                  _add_constant(graph, f"{stem}_scale", scale.astype(np.float32)),
                  _add_constant(graph, f"{stem}_zero_point", np.zeros(len(codes), np.int32))]
        dequantize = onnx_ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{stem}_dequantize",
                                  outputs=[onnx_ir.Value(name=f"{stem}_dequantized")])
        graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])


def add_zero_points(graph: onnx_ir.Graph) -> None:
    """Give the weights of each layer zero points of their own.

    Integer kernels require them, and ONNX Runtime computes exactly on processors without VNNI
    (``runtimes.onnxruntime``) only if layers share none.
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 2:
            node.resize_inputs(3)
            zeros = np.zeros(_constant(node, 1).shape, np.int8)
            node.replace_input_with(2, _add_constant(graph, f"{node.name}_zero_point", zeros))


def _scale(before: int, after: int) -> np.float32:
    """The least float32 factor from which a runtime, rounding down, gets this size."""
    scale = np.float32(after / before)
    return scale if float(scale) * before >= after else np.nextafter(scale, np.float32(np.inf))


def _constant(node: onnx_ir.Node, place: int) -> NDArray[Any]:
    value: Any = node.inputs[place]
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _add_constant(graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _strip(model: onnx_ir.Model) -> None:
    """Remove the exporter's debug notes: stack traces with paths of this machine, as large as weights."""
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.doc_string = None
        value.metadata_props.clear()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress steps on stdout, logs, and warnings of the exporter's own deprecations."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
