"""Weights as TensorRT 8 reads them: as floats before a quantizer. It takes no s8 constants."""

from typing import Dict, Iterator, List, NamedTuple, Optional

import numpy as np

from uadtool.schemas.protobuf import read_fields, read_messages, write_field

GRAPH = 7
NODE, INITIALIZER = 1, 5
INPUT, OUTPUT, NODE_NAME, OPERATOR, ATTRIBUTE = 1, 2, 3, 4, 5
DIMENSION, KIND, TENSOR_NAME, RAW = 1, 2, 8, 9
"""Field numbers of ModelProto, GraphProto, NodeProto and TensorProto, from onnx.proto."""
FLOAT, INT8 = 1, 3
"""Values of TensorProto.DataType."""


class _Tensor(NamedTuple):
    name: bytes
    kind: int
    shape: List[int]
    data: memoryview


def with_float_weights(model: bytes) -> bytes:
    """The ONNX model with the s8 constants of DequantizeLinear as the floats that they stand for.

    A QuantizeLinear with the same scales gives exactly the codes again.

    Raises:
        ValueError: ``model`` is not a ModelProto, or its codes and scales do not fit.
    """
    try:
        return b"".join(write_field(GRAPH, _changed(value)) if number == GRAPH and isinstance(value, memoryview) else
                        bytes(raw) for number, value, raw in read_fields(memoryview(model)))
    except (KeyError, IndexError) as error:
        raise ValueError(f"a DequantizeLinear lacks its scale: {error}") from error


def _changed(graph: memoryview) -> Iterator[bytes]:
    """The fields of a GraphProto with other weights."""
    tensors = {tensor.name: tensor for tensor in (
        _read_tensor(content) for number, content in read_messages(graph) if number == INITIALIZER)}
    scales: Dict[Optional[bytes], _Tensor] = {}
    for number, content in read_messages(graph):
        parts = [(part, bytes(value)) for part, value in read_messages(content)] if number == NODE else []
        if (OPERATOR, b"DequantizeLinear") not in parts:
            continue
        codes, *others = (value for part, value in parts if part == INPUT)
        if codes in tensors and tensors[codes].kind == INT8 and codes not in scales:
            scales[codes] = tensors[others[0]]
            # All quantizers come first, since they only read constants. Their results take the names of the codes.
            yield write_field(NODE, [
                *(write_field(INPUT, name) for name in (codes + b"_float", *others)), write_field(OUTPUT, codes),
                write_field(NODE_NAME, codes + b"_quantize"), write_field(OPERATOR, b"QuantizeLinear"),
                *(bytes(raw) for part, _, raw in read_fields(content) if part == ATTRIBUTE)])
    for number, value, raw in read_fields(graph):
        name = _read_tensor(value).name if number == INITIALIZER and isinstance(value, memoryview) else None
        yield _float_tensor(tensors[name], scales[name]) if name is not None and name in scales else bytes(raw)


def _float_tensor(codes: _Tensor, scale: _Tensor) -> bytes:
    """The field of an initializer with the values of these codes, whose first axis has the scales."""
    factors = np.frombuffer(scale.data, "<f4")
    values = np.frombuffer(codes.data, np.int8).reshape(len(factors), -1) * factors[:, None]
    return write_field(INITIALIZER, [
        *(write_field(DIMENSION, size) for size in codes.shape), write_field(KIND, FLOAT),
        write_field(TENSOR_NAME, codes.name + b"_float"), write_field(RAW, values.astype("<f4").tobytes())])


def _read_tensor(tensor: memoryview) -> _Tensor:
    fields = list(read_fields(tensor))
    values = {number: value for number, value, _ in fields}
    name, kind, data = values.get(TENSOR_NAME, b""), values.get(KIND, 0), values.get(RAW, memoryview(b""))
    shape = [value for number, value, _ in fields if number == DIMENSION and isinstance(value, int)]
    if isinstance(name, int) or isinstance(data, int) or not isinstance(kind, int):
        raise ValueError("a constant has fields of wrong types")
    return _Tensor(bytes(name), kind, shape, data)
