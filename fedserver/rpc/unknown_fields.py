"""Refuses messages with fields that this version does not know."""

from __future__ import annotations

from functools import cache
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from fedcore.errors import InvalidInput

MAX_FIELDS: Final = 20_000
"""Fields that one message may have in all, repeated ones and those of messages within it included."""

# Wire types; groups, the others, are in none of our messages.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES: Final[dict[int, int]] = {
    FieldDescriptor.TYPE_BOOL: _VARINT,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_ENUM: _VARINT,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_UINT32: _VARINT,
    FieldDescriptor.TYPE_UINT64: _VARINT,
}


def refuse_unknown_fields(data: bytes, kind: Descriptor) -> None:
    """Raise if an encoded message, or a message inside it, carries a field that is not in its definition.

    protobuf keeps such fields silently. Here they mean a peer of another version, or somebody hiding bytes. Looks at
    the tags alone: what takes long is neither copied nor read.

    Raises:
        InvalidInput: naming the message and the field's number; or too many fields; or no message at all.
    """
    todo = [(0, len(data), kind)]
    num_fields = 0
    while todo:
        position, end, kind = todo.pop()
        known = _fields(kind)
        while position < end:
            num_fields += 1
            if num_fields > MAX_FIELDS:
                raise InvalidInput(f"{kind.name} has more than {MAX_FIELDS} fields")
            tag, position = _varint(data, position, end)
            number, wire_type = tag >> 3, tag & 7
            expected, inner = known.get(number, (None, None))
            if wire_type != expected:
                raise InvalidInput(
                    f"{kind.name} has field {number} of wire type {wire_type}, which this version does not know"
                )
            if wire_type == _BYTES:
                length, position = _varint(data, position, end)
                if inner is not None:
                    todo.append((position, min(position + length, end), inner))
                position += length
            elif wire_type == _VARINT:
                _, position = _varint(data, position, end)
            else:
                position += 8 if wire_type == _FIXED64 else 4
        if position != end:
            raise InvalidInput(f"{kind.name} is cut short")


@cache
def _fields(kind: Descriptor) -> dict[int, tuple[int, Descriptor | None]]:
    """Return the fields by number, each with its wire type and the message that it holds, if it holds one."""
    return {field.number: (_WIRE_TYPES[field.type], field.message_type) for field in kind.fields}


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """Return the number at `position`, and where it ends."""
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidInput("a number in a message is cut short, or longer than 64 bits")
