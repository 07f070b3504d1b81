"""From a detector in torch to a complete ONNX detector: graph, integer biases, metadata."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from uadtool.artifacts import atomic_write
from uadtool.detectors import Output
from uadtool.errors import UadtoolError
from uadtool.metadata import KEY, Metadata

OPSET = 18
IR_VERSION = 8
"""The oldest that holds opset 18: ONNX Runtime 1.14 and later read it."""


def to_onnx(model: nn.Module, metadata: Metadata) -> ModelProto:
    """The complete detector: ``image`` uint8 [N, H, W, 3] -> ``score``, ``anomaly_map``, ``nearest_class``; any N.

    Raises:
        UadtoolError: the exporter of torch made something else, which a newer or older torch may.
    """
    height, width = metadata.image_size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    # The exporter reports its steps on stdout and warns of its own deprecations.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
            input_names=["image"], output_names=list(Output._fields),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )
    assert program is not None
    proto = program.model_proto
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    if opset != OPSET:
        raise UadtoolError(f"torch {torch.__version__} wrote opset {opset} instead of {OPSET}")
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "uadtool", metadata.tool_version
    _strip(proto)
    if metadata.precision == "int8":
        quantize_biases(proto)
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


def quantize_biases(proto: ModelProto) -> None:
    """Write the bias of each convolution between quantized tensors as s32, in units of input scale x weight scale.

    That is the form in which ONNX Runtime fuses Q/DQ and Conv to QLinearConv. Nothing is lost: quantization rounded
    the bias to these units.
    """
    graph = proto.graph
    constants = {t.name: t for t in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in list(graph.node):
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        values, weight = (producers.get(name, node) for name in node.input[:2])
        if {values.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        scale = (numpy_helper.to_array(constants[values.input[1]]).astype(np.float64)
                 * numpy_helper.to_array(constants[weight.input[1]]).astype(np.float64))
        name = node.input[2]
        bias = numpy_helper.to_array(constants[name]).astype(np.float64)
        limits = np.iinfo(np.int32)
        codes = np.clip(np.rint(bias / scale), limits.min, limits.max).astype(np.int32)
        stem = f"{node.output[0]}_bias"
        graph.initializer.extend([numpy_helper.from_array(codes, f"{stem}_quantized"),
                                  numpy_helper.from_array(scale.astype(np.float32), f"{stem}_scale"),
                                  numpy_helper.from_array(np.zeros(len(codes), np.int32), f"{stem}_zero_point")])
        dequantize = onnx.helper.make_node(
            "DequantizeLinear", [f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"], [f"{stem}_dequantized"],
            name=f"{stem}_dequantize", axis=0)
        graph.node.insert(list(graph.node).index(node), dequantize)
        node.input[2] = f"{stem}_dequantized"
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
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
