"""Checks on an ONNX file before a runtime opens it: it has metadata, and no tensors in other files.

It is parsed here because the edge half does not require the onnx package.
"""

from pathlib import Path
from typing import Dict, Iterator, Tuple

from uadtool.errors import UadtoolError, reading
from uadtool.metadata import KEY, Metadata

MOST_BYTES = (1 << 31) - 1
"""Limit of a protobuf file; larger networks need external data."""

VARINT, LENGTH_DELIMITED = 0, 2
FIXED_SIZES = {1: 8, 5: 4}
"""Wire types of protobuf (https://protobuf.dev/programming-guides/encoding), and bytes of those of fixed size."""

METADATA_PROPS = 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
"""Field numbers of ModelProto and StringStringEntryProto, from onnx.proto."""

EXTERNAL_DATA = ("TensorProto", 13)
INSIDE = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
                       22: "SparseTensorProto", 23: "SparseTensorProto"},
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
"""Message of onnx.proto -> fields that may contain a tensor -> their messages."""

DEEPEST = 100
"""Levels of nested messages; protobuf itself has the same limit."""


def read_metadata(path: str) -> Metadata:
    """The metadata that export wrote into the ONNX file ``path``.

    Raises:
        UadtoolError: the file cannot be read, is damaged, was not made by uadtool, or names other files, which a
            runtime would read from anywhere.
    """
    try:
        with reading(path):
            if Path(path).stat().st_size > MOST_BYTES:
                raise ValueError("it is larger than 2 GiB")
            model = Path(path).read_bytes()
        properties = read_properties(model)
        external = has_external_data(model)
    except ValueError as error:
        raise UadtoolError(f"{path} is damaged or not an ONNX file: {error}") from error
    if external:
        raise UadtoolError(f"{path} has tensors in other files (external data), which uadtool does not read; export "
                           "writes everything into one file")
    return Metadata.from_json(properties.get(KEY), path)


def read_properties(model: bytes) -> Dict[str, str]:
    """The ``metadata_props`` of a serialized ModelProto.

    Raises:
        ValueError: ``model`` is not a ModelProto.
    """
    properties = {}
    for number, content in _messages(memoryview(model)):
        if number == METADATA_PROPS:
            entry = dict(_messages(content))
            key, value = (bytes(entry.get(part, b"")).decode() for part in (ENTRY_KEY, ENTRY_VALUE))
            properties[key] = value
    return properties


def has_external_data(model: bytes) -> bool:
    """Whether a serialized ModelProto has a tensor in another file.

    Raises:
        ValueError: ``model`` is not a ModelProto.
    """
    pending = [("ModelProto", memoryview(model), 0)]
    while pending:
        kind, message, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        for number, content in _messages(message):
            if (kind, number) == EXTERNAL_DATA:
                return True
            if number in INSIDE[kind]:
                pending.append((INSIDE[kind][number], content, depth + 1))
    return False


def _messages(message: memoryview) -> Iterator[Tuple[int, memoryview]]:
    """Number and content of each length-delimited field of a message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field {number} does not exist")
        if wire_type == VARINT:
            _, at = _varint(message, at)
            continue
        if wire_type == LENGTH_DELIMITED:
            size, at = _varint(message, at)
        elif wire_type in FIXED_SIZES:
            size = FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} does not exist")
        if size > len(message) - at:
            raise ValueError("it ends too early")
        if wire_type == LENGTH_DELIMITED:
            yield number, message[at:at + size]
        at += size


def _varint(message: memoryview, at: int) -> Tuple[int, int]:
    """The variable-length number at ``at``, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at:at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number does not end")
