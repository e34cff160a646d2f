"""Messages of the wire ↔ values of `fedcore.messages`; what the server sends is checked before it becomes a value."""

from __future__ import annotations

import re
from typing import Final

from fedcore.errors import InvalidInput, Refused, UpdateResult
from fedcore.jobfile import MAX_JOB_BYTES
from fedcore.messages import (
    MESSAGE_BYTES,
    Assignment,
    Cancel,
    Decline,
    Heartbeat,
    Hello,
    Piece,
    SmallUpdate,
    UploadState,
    WorkKind,
)
from fedcore.privacy import MAX_CLIP
from fedproto.v1 import client_pb2

MAX_REASON_CHARS: Final = 2000

_ID: Final = re.compile(r"[0-9a-f]{32}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_KINDS: Final = {
    client_pb2.WORK_KIND_INITIALISE: WorkKind.INITIALISE,
    client_pb2.WORK_KIND_GRADIENT: WorkKind.GRADIENT,
    client_pb2.WORK_KIND_TRAIN: WorkKind.TRAIN,
    client_pb2.WORK_KIND_EVALUATE: WorkKind.EVALUATE,
}
PIECES: Final = {
    Piece.FRAME: client_pb2.PIECE_FRAME,
    Piece.BASIS: client_pb2.PIECE_BASIS,
    Piece.CHANGE: client_pb2.PIECE_CHANGE,
}


class UnfitAssignment(InvalidInput):
    """An assignment that this client does not understand, such as one from a newer server."""

    code = "unfit-assignment"


def hello_to_wire(hello: Hello) -> client_pb2.SessionRequest:
    """Return the first message of a session."""
    return client_pb2.SessionRequest(
        hello=client_pb2.Hello(
            software=hello.software,
            device=hello.device,
            tasks=hello.tasks,
            adapters=hello.adapters,
            codecs=hello.codecs,
            assignment_ids=hello.assignment_ids,
        )
    )


def event_to_wire(event: Heartbeat | Decline | SmallUpdate) -> client_pb2.SessionRequest:
    """Return a later message of a session."""
    match event:
        case Heartbeat():
            beat = client_pb2.Heartbeat(assignment_id=event.assignment_id, progress=event.progress)
            return client_pb2.SessionRequest(heartbeat=beat)
        case Decline():
            reason = event.reason[:MAX_REASON_CHARS]
            decline = client_pb2.Decline(assignment_id=event.assignment_id, reason=reason, transient=event.transient)
            return client_pb2.SessionRequest(decline=decline)
        case SmallUpdate():
            request = client_pb2.SessionRequest()
            update = request.update  # filled in place: a message given to another one is copied, and its frame too
            update.number = event.number
            update.header, update.signature, update.frame = event.header, event.signature, event.frame
            return request


def assignment_from_wire(message: client_pb2.Assignment) -> Assignment:
    """Return the assignment.

    Raises:
        UnfitAssignment: a field is not what this client understands; the text names it.
    """
    kind = _KINDS.get(message.kind)
    if kind is None:
        raise UnfitAssignment(f"unknown kind of work {int(message.kind)}: the server may be newer than this client")
    for name, value in (("assignment_id", message.assignment_id), ("job_id", message.job_id)):
        if _ID.fullmatch(value) is None:
            raise UnfitAssignment(f"{name} {value[:80]!r} is not 32 hexadecimal digits")
    if kind is not WorkKind.INITIALISE:
        for name, value in (("layout_digest", message.layout_digest), ("frame_digest", message.frame_digest)):
            if _DIGEST.fullmatch(value) is None:
                raise UnfitAssignment(f"{name} {value[:80]!r} is not 64 hexadecimal digits")
    if len(message.job) > MAX_JOB_BYTES:
        raise UnfitAssignment(f"job of {len(message.job)} bytes, at most {MAX_JOB_BYTES}")
    if message.frame and not len(message.frame) == message.frame_bytes <= MESSAGE_BYTES:
        raise UnfitAssignment(
            f"frame of {len(message.frame)} bytes within the session, announced are {message.frame_bytes}, at most"
            f" {MESSAGE_BYTES} are sent so"
        )
    _check_frozen(message)
    if message.counted_in > message.version:
        raise UnfitAssignment(f"counted_in {message.counted_in} is above the version, {message.version}")
    if not 0 <= message.clip <= MAX_CLIP:  # NaN is not
        raise UnfitAssignment(f"clip {message.clip}, from 0 to {MAX_CLIP:g}")
    return Assignment(
        assignment_id=message.assignment_id,
        job_id=message.job_id,
        job=message.job,
        version=message.version,
        kind=kind,
        seed=message.seed,
        layout_digest=message.layout_digest,
        frame_digest=message.frame_digest,
        frame_bytes=message.frame_bytes,
        deadline_s=message.deadline_ms / 1000,
        frame=message.frame,
        counted_in=message.counted_in,
        basis_digest=message.basis_digest,
        base_revision=message.base_revision,
        changed_since=message.changed_since,
        base_digest=message.base_digest,
        clip=message.clip,
    )


def _check_frozen(message: client_pb2.Assignment) -> None:
    for name, value in (
        ("basis_digest", message.basis_digest),
        ("base_revision", message.base_revision),
        ("base_digest", message.base_digest),
    ):
        if value and _DIGEST.fullmatch(value) is None:
            raise UnfitAssignment(f"{name} {value[:80]!r} is not 64 hexadecimal digits")
    if message.changed_since > message.version or bool(message.changed_since) != bool(message.base_revision):
        text = "revision" if message.base_revision else "no revision"
        raise UnfitAssignment(f"changed_since {message.changed_since} of version {message.version} with {text}")


def cancel_from_wire(message: client_pb2.Cancel) -> Cancel:
    """Return the cancellation."""
    return Cancel(message.assignment_id, message.reason[:MAX_REASON_CHARS])


def heartbeat_interval_s(message: client_pb2.Welcome) -> float:
    """Return the server's wish, within 0.1 s and one hour: neither a busy loop nor silence."""
    return min(max(message.heartbeat_interval_ms / 1000, 0.1), 3600.0)


def upload_state_from_wire(message: client_pb2.UploadState) -> UploadState:
    """Return the state.

    Raises:
        Refused: a result that this client does not know.
    """
    if not message.result:
        return UploadState(message.received_bytes)
    if message.result not in UpdateResult.__members__.values():
        raise Refused(
            f"the server answered {message.result[:80]!r}, which this client does not know: {message.text[:200]}"
        )
    return UploadState(message.received_bytes, UpdateResult(message.result), message.text[:MAX_REASON_CHARS])
