"""The compatibility law of proto/README.md: what a field number or a name once meant, it means for ever,
from the first release on.

`wire_fields.json` is the record. A new field, value or method is added to it by hand, in the change that brings it; a
line that stands there is never edited. What goes from a message is `reserved` there, and its line stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from fedproto.v1 import client_pb2, enrolment_pb2, operator_pb2

RECORD: dict[str, str] = json.loads((Path(__file__).parent / "wire_fields.json").read_text(encoding="utf-8"))
FILES: list[FileDescriptor] = [client_pb2.DESCRIPTOR, enrolment_pb2.DESCRIPTOR, operator_pb2.DESCRIPTOR]
MESSAGES: dict[str, Descriptor] = {
    name: message for file in FILES for name, message in file.message_types_by_name.items()
}


def kind_of(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        word = field.message_type.name
    elif field.enum_type is not None:
        word = field.enum_type.name
    else:
        kind = cast("FieldDescriptorProto.Type.ValueType", field.type)
        word = FieldDescriptorProto.Type.Name(kind).removeprefix("TYPE_").lower()
    return f"repeated {word}" if field.is_repeated else word


def described() -> Iterator[tuple[str, str]]:
    """Yield what stands in the .proto files, as the record has it."""
    for name, message in MESSAGES.items():
        for field in message.fields:
            place = f" in {field.containing_oneof.name}" if field.containing_oneof else ""
            yield f"{name}.{field.name}", f"{field.number} {kind_of(field)}{place}"
    for file in FILES:
        for enum in file.enum_types_by_name.values():
            yield from ((f"{enum.name}.{value.name}", str(value.number)) for value in enum.values)
        for service in file.services_by_name.values():
            for method in service.methods:
                sends = "stream " * method.client_streaming + method.input_type.name
                hears = "stream " * method.server_streaming + method.output_type.name
                yield f"{service.name}.{method.name}", f"{sends} → {hears}"


NOW = dict(described())


def test_everything_on_the_wire_is_recorded() -> None:
    assert sorted(set(NOW) - set(RECORD)) == []


@pytest.mark.parametrize("name", RECORD)
def test_what_was_recorded_means_the_same_or_is_reserved(name: str) -> None:
    if name in NOW:
        assert NOW[name] == RECORD[name]
        return
    message, _, field = name.partition(".")
    assert message in MESSAGES, f"{message} is gone: keep the message or the enumeration"
    definition = DescriptorProto()
    MESSAGES[message].CopyToProto(definition)
    number = int(RECORD[name].split()[0])
    assert field in definition.reserved_name
    assert any(taken.start <= number < taken.end for taken in definition.reserved_range)


def test_every_file_is_of_version_one() -> None:
    assert {file.package for file in FILES} == {"fedproto.v1"}


def test_zero_of_every_enumeration_is_unspecified() -> None:
    enums = [enum for file in FILES for enum in file.enum_types_by_name.values()]
    assert enums
    assert all(enum.values_by_number[0].name.endswith("_UNSPECIFIED") for enum in enums)
