"""Checks on an ONNX file before a runtime opens it: it has metadata, and no tensors in other files."""

from pathlib import Path
from typing import Dict

from uadtool.errors import UadtoolError, reading
from uadtool.metadata import KEY, Metadata
from uadtool.schemas.protobuf import read_messages

MOST_BYTES = (1 << 31) - 1
"""Limit of a protobuf file; larger networks need external data."""

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
    for number, content in read_messages(memoryview(model)):
        if number == METADATA_PROPS:
            entry = dict(read_messages(content))
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
        for number, content in read_messages(message):
            if (kind, number) == EXTERNAL_DATA:
                return True
            if number in INSIDE[kind]:
                pending.append((INSIDE[kind][number], content, depth + 1))
    return False
