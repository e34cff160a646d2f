"""Refuses messages with fields that this version does not know."""

from __future__ import annotations

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fedcore.errors import InvalidInput


def refuse_unknown_fields(message: Message) -> None:
    """Raise if `message`, or a message inside it, carries a field that is not in its definition.

    protobuf keeps such fields silently. Here they mean a peer of another version, or somebody hiding bytes.

    Raises:
        InvalidInput: naming the message and the field's number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidInput(f"{message.DESCRIPTOR.name} has unknown field {unknown[0].field_number}")
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                refuse_unknown_fields(inner)
