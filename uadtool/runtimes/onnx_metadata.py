"""The metadata in an ONNX file, read without the onnx package, which the edge half does not need otherwise."""

from pathlib import Path
from typing import Dict, Iterator, Tuple

from uadtool.errors import UadtoolError
from uadtool.metadata import KEY, Metadata

METADATA_PROPS = 14
ENTRY_KEY, ENTRY_VALUE = 1, 2
"""Numbers of fields of ModelProto and of StringStringEntryProto, from onnx.proto."""

VARINT, LENGTH_DELIMITED = 0, 2
FIXED_SIZES = {1: 8, 5: 4}
"""Wire types of protobuf (https://protobuf.dev/programming-guides/encoding) and bytes of those of one size."""


def read_metadata(path: str) -> Metadata:
    """The metadata that export wrote into the ONNX file ``path``.

    Raises:
        UadtoolError: the file cannot be read, is damaged, or was not made by uadtool.
    """
    try:
        properties = read_properties(Path(path).read_bytes())
    except OSError as error:
        raise UadtoolError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UadtoolError(f"{path} is damaged, or no ONNX file: {error}") from error
    return Metadata.from_json(properties.get(KEY), path)


def read_properties(model: bytes) -> Dict[str, str]:
    """The ``metadata_props`` of a serialized ModelProto.

    Raises:
        ValueError: it is none.
    """
    properties = {}
    for number, content in _fields(memoryview(model)):
        if number == METADATA_PROPS:
            entry = dict(_fields(content))
            key, value = (bytes(entry.get(part, b"")).decode() for part in (ENTRY_KEY, ENTRY_VALUE))
            properties[key] = value
    return properties


def _fields(message: memoryview) -> Iterator[Tuple[int, memoryview]]:
    """Number and content of each field of a message; numbers of variable length are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            _, at = _varint(message, at)
            continue
        if wire_type == LENGTH_DELIMITED:
            size, at = _varint(message, at)
        elif wire_type in FIXED_SIZES:
            size = FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"there is no wire type {wire_type}")
        if size > len(message) - at:
            raise ValueError("it ends too early")
        yield number, message[at:at + size]
        at += size


def _varint(message: memoryview, at: int) -> Tuple[int, int]:
    """The number of variable length at ``at``, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at:at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number does not end")
