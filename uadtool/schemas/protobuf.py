"""Serialized protobuf messages, such as ONNX files: the edge half does not require the onnx package.

https://protobuf.dev/programming-guides/encoding
"""

from typing import Iterable, Iterator, NamedTuple, Tuple, Union

VARINT, LENGTH_DELIMITED = 0, 2
FIXED_SIZES = {1: 8, 5: 4}
"""Wire types, and bytes of those of fixed size."""


class Field(NamedTuple):
    """A field of a message.

    ``value`` is the number of a varint, otherwise the bytes of the content; ``raw`` is the whole field as it was read.
    """

    number: int
    value: Union[int, memoryview]
    raw: memoryview


def read_fields(message: memoryview) -> Iterator[Field]:
    """The fields of a serialized message, in order.

    Raises:
        ValueError: it is not a message.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"field {number} does not exist")
        if wire_type == VARINT:
            value, at = _varint(message, at)
            yield Field(number, value, message[start:at])
            continue
        if wire_type == LENGTH_DELIMITED:
            size, at = _varint(message, at)
        elif wire_type in FIXED_SIZES:
            size = FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} does not exist")
        if size > len(message) - at:
            raise ValueError("it ends too early")
        yield Field(number, message[at:at + size], message[start:at + size])
        at += size


def read_messages(message: memoryview) -> Iterator[Tuple[int, memoryview]]:
    """Number and content of each field of a message that has bytes: messages, strings, packed numbers.

    Raises:
        ValueError: it is not a message.
    """
    for number, value, raw in read_fields(message):
        if isinstance(value, memoryview) and raw[0] & 7 == LENGTH_DELIMITED:
            yield number, value


def write_field(number: int, value: Union[int, bytes, memoryview, Iterable[bytes]]) -> bytes:
    """A serialized field: a varint, or bytes, also in parts."""
    if isinstance(value, int):
        return _write_varint(number << 3 | VARINT) + _write_varint(value)
    content = bytes(value) if isinstance(value, (bytes, memoryview)) else b"".join(value)
    return _write_varint(number << 3 | LENGTH_DELIMITED) + _write_varint(len(content)) + content


def _varint(message: memoryview, at: int) -> Tuple[int, int]:
    """The variable-length number at ``at``, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at:at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number does not end")


def _write_varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
