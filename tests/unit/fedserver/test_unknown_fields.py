"""Fields that no definition knows are found in the encoded bytes, wherever they are; protobuf is the oracle."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import enrolment_pb2, operator_pb2
from fedserver.rpc import unknown_fields
from fedserver.rpc.unknown_fields import MAX_FIELDS, refuse_unknown_fields

UPDATE = pb.SessionRequest(update=pb.Update(number=2**64 - 1, header=b"{}", signature=b"s" * 64, frame=bytes(300)))
MESSAGES = [
    pb.SessionRequest(),
    UPDATE,
    pb.SessionRequest(hello=pb.Hello(software="1", tasks=["a", "", "b" * 200], codecs=["raw"])),
    pb.SessionRequest(heartbeat=pb.Heartbeat(assignment_id="ab" * 16, progress=0.5)),
    pb.SessionRequest(decline=pb.Decline(reason="no", transient=True)),
    pb.UploadRequest(opening=pb.UploadOpening(header=b"{}", offset=2**63)),
    pb.UploadRequest(chunk=pb.Chunk(offset=1, data=bytes(1 << 20))),
    operator_pb2.StatusRequest(job_id="x", watch=True),
    enrolment_pb2.EnrolRequest(secret="s", signing_key=bytes(32)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.DESCRIPTOR.name)
def test_what_the_definition_knows_passes(message: pb.SessionRequest) -> None:
    refuse_unknown_fields(message.SerializeToString(), message.DESCRIPTOR)


@pytest.mark.parametrize(
    "extra",
    [
        b"\xa0\x06\x01",
        b"\xa2\x06\x01x",
        b"\xa5\x06abcd",
        b"\xa1\x06abcdefgh",
        b"\xa3\x06\xa4\x06",
        b"\x08\x01",
        b"\x0d0123",
    ],
    ids=["varint", "bytes", "fixed32", "fixed64", "group", "known number as varint", "known number as fixed32"],
)
def test_what_it_does_not_know_is_refused_outside_and_inside(extra: bytes) -> None:
    data = UPDATE.SerializeToString()
    inner = UPDATE.update.SerializeToString() + extra.replace(b"\x08\x01", b"\x10\x01")
    within = b"\x22" + bytes([len(inner) & 0x7F | 0x80, len(inner) >> 7]) + inner
    for hostile in (data + extra, extra + data, within):
        parsed = pb.SessionRequest.FromString(hostile)
        whole = parsed.ByteSize()
        parsed.DiscardUnknownFields()
        assert parsed.ByteSize() < whole
        with pytest.raises(InvalidInput, match="does not know"):
            refuse_unknown_fields(hostile, pb.SessionRequest.DESCRIPTOR)


def test_more_fields_than_any_message_needs_are_refused_before_they_are_all_read() -> None:
    data = pb.SessionRequest(hello=pb.Hello(tasks=[""] * 2 * MAX_FIELDS)).SerializeToString()
    with pytest.raises(InvalidInput, match=f"more than {MAX_FIELDS} fields"):
        refuse_unknown_fields(data, pb.SessionRequest.DESCRIPTOR)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_bytes_that_are_no_message_are_refused_and_nothing_else_happens(noise: bytes, cut: int) -> None:
    data = UPDATE.SerializeToString()[:cut] + noise
    with suppress(InvalidInput):
        refuse_unknown_fields(data, pb.SessionRequest.DESCRIPTOR)


def test_every_kind_of_field_in_our_messages_has_its_wire_type() -> None:
    for file in (pb.DESCRIPTOR, operator_pb2.DESCRIPTOR, enrolment_pb2.DESCRIPTOR):
        for kind in file.message_types_by_name.values():
            assert len(unknown_fields._fields(kind)) == len(kind.fields)
