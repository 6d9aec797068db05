"""Messages of Google's protocol buffers, field by field, as far as a sentencepiece model has them.

sentencepiece brings no way to look into its models but by the package protobuf, which nothing else here needs.
"""

import struct
from collections.abc import Iterator
from typing import Any

BYTES = 2  # wire type of texts, bytes and inner messages


def fields(content: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of a message's fields: whole numbers, fp32, or bytes.

    Raises IndexError where the message is cut off or is none.
    """
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(content, at)
        elif wire == BYTES:
            length, at = _varint(content, at)
            value, at = content[at : at + length], at + length
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = content[at : at + size], at + size
        else:
            raise IndexError(f"field {number} has the unknown wire type {wire}")
        if at > len(content):
            raise IndexError(f"field {number} is cut off")
        yield number, wire, struct.unpack("<f", value)[0] if wire == 5 else value


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
