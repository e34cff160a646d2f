"""ClientService: decode, call the federation, encode."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Final

from fedcore.errors import Busy, FedError, InvalidInput, UpdateRejected, UpdateResult
from fedcore.messages import (
    CHUNK_BYTES,
    Answer,
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
from fedcore.names import check_name
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc as pb_grpc
from fedserver.federation import HEARTBEAT_INTERVAL_S, Federation
from fedserver.rounds import intake as updates
from fedserver.rounds.fleet import Seat
from fedserver.rpc.gatekeeper import Context, caller_name, check_again
from fedserver.rpc.patience import Flow

KINDS = {
    WorkKind.INITIALISE: pb.WORK_KIND_INITIALISE,
    WorkKind.GRADIENT: pb.WORK_KIND_GRADIENT,
    WorkKind.TRAIN: pb.WORK_KIND_TRAIN,
    WorkKind.EVALUATE: pb.WORK_KIND_EVALUATE,
}
PIECES = {
    pb.PIECE_UNSPECIFIED: Piece.FRAME,
    pb.PIECE_FRAME: Piece.FRAME,
    pb.PIECE_BASIS: Piece.BASIS,
    pb.PIECE_CHANGE: Piece.CHANGE,
}
MAX_NAMES: Final = 1000
MAX_UNREAD: Final = 64
"""Orders and answers that may wait for a client to read them. It has one work at a time, so there are a few at most."""
_ID: Final = re.compile(r"[0-9a-f]{32}")


class ClientService(pb_grpc.ClientServiceServicer):
    """See proto/fedproto/v1/client.proto."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionReply]:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("event") != "hello":
            raise InvalidInput("a session starts with hello")
        seat = self._federation.join(caller_name(), _hello(first.hello))
        listening = asyncio.create_task(self._listen(seat, requests))
        try:
            yield pb.SessionReply(welcome=pb.Welcome(heartbeat_interval_ms=int(HEARTBEAT_INTERVAL_S * 1000)))
            async for order in self._federation.orders(seat):
                yield _order(order)
                del order  # not held while its client works
        finally:
            listening.cancel()
            self._federation.leave(seat)

    async def _listen(self, seat: Seat, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Take what the client says, until it has no more to say or says what it may not."""
        reason: FedError | None = None
        try:
            async for request in requests:
                check_again()
                if seat.num_waiting > MAX_UNREAD:
                    raise Busy(f"{seat.num_waiting} orders and answers wait to be read")
                event = _event(request)
                del request  # it may be large: not held beside what was made of it, nor while the next is on its way
                await self._federation.heard(seat, event)
                del event
        except FedError as error:
            reason = error
        finally:
            self._federation.leave(seat, reason)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        offset, piece = request.offset, PIECES.get(request.piece)
        if piece is None:
            raise InvalidInput(f"piece {int(request.piece)}: from 0 to {max(PIECES)}")
        async for data in self._federation.piece(check_name(request.job_id, "job"), request.version, piece, offset):
            check_again()
            reply = pb.Chunk(offset=offset, data=data)
            offset += len(data)
            del data  # of each stream that waits for its reader, one copy is enough
            yield reply

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.UploadState:
        return _state(await self._federation.intake.state_of(caller_name(), check_name(request.update_id, "update")))

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: Context) -> pb.UploadState:
        intake = self._federation.intake
        try:
            first = await anext(aiter(requests), None)
            if first is None or first.WhichOneof("part") != "opening":
                raise UpdateRejected(UpdateResult.MALFORMED, "an upload starts with its opening")
            announced = await intake.announce(caller_name(), first.opening.header, first.opening.signature)
            if isinstance(announced, UploadState):
                return _state(announced)
            upload = intake.upload(announced)
            if first.opening.offset != (held := await upload.resume()):
                return _state(UploadState(held))
            return _state(await self._receive(upload, requests))
        except UpdateRejected as error:
            return _state(UploadState(0, error.reason, str(error)))

    async def _receive(self, upload: updates.Upload, requests: AsyncIterator[pb.UploadRequest]) -> UploadState:
        flow = Flow(requests, self._federation.services.clock)
        async for request in flow:
            check_again()
            flow.brought(await _append(upload, request))
            del request  # not held while the next one is on its way
        return await upload.finish() if upload.complete else UploadState(upload.num_bytes)


async def _append(upload: updates.Upload, request: pb.UploadRequest) -> int:
    """Take a chunk and return its length."""
    offset, data = request.chunk.offset, request.chunk.data  # each look at `data` makes a copy
    if request.WhichOneof("part") != "chunk" or len(data) > CHUNK_BYTES:
        raise UpdateRejected(UpdateResult.MALFORMED, f"expected a chunk of at most {CHUNK_BYTES} bytes")
    await upload.append(offset, data)
    return len(data)


def _hello(hello: pb.Hello) -> Hello:
    for assignment_id in hello.assignment_ids:
        if not _ID.fullmatch(assignment_id):
            raise InvalidInput(f"assignment id {assignment_id[:80]!r} is not 32 hex digits")
    return Hello(
        hello.software[:100],
        hello.device[:100],
        _names("tasks", hello.tasks),
        _names("adapters", hello.adapters),
        _names("codecs", hello.codecs),
        _bounded("assignment_ids", hello.assignment_ids),
    )


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(check_name(name, f"one of the {what}") for name in _bounded(what, names))


def _bounded(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if len(names) > MAX_NAMES:
        raise InvalidInput(f"hello names {len(names)} {what}, at most {MAX_NAMES}")
    return tuple(names)


def _event(request: pb.SessionRequest) -> Heartbeat | Decline | SmallUpdate:
    match request.WhichOneof("event"):
        case "heartbeat":
            return Heartbeat(request.heartbeat.assignment_id, request.heartbeat.progress)
        case "decline":
            decline = request.decline
            return Decline(decline.assignment_id, decline.reason, decline.transient)
        case "update":
            update = request.update
            return SmallUpdate(update.number, update.header, update.signature, update.frame)
        case other:
            raise InvalidInput(f"{other or 'nothing'} is not said during a session")


def _order(order: Assignment | Cancel | Answer) -> pb.SessionReply:
    match order:
        case Answer(number, state):
            return pb.SessionReply(upload=_state(state, number))
        case Cancel(assignment_id, reason):
            return pb.SessionReply(cancel=pb.Cancel(assignment_id=assignment_id, reason=reason))
        case Assignment():
            reply = pb.SessionReply()
            assignment = reply.assignment  # filled in place: a message that is given to another one is copied
            assignment.assignment_id = order.assignment_id
            assignment.job_id = order.job_id
            assignment.job = order.job
            assignment.version = order.version
            assignment.kind = KINDS[order.kind]
            assignment.seed = order.seed
            assignment.layout_digest = order.layout_digest
            assignment.frame_digest = order.frame_digest
            assignment.frame_bytes = order.frame_bytes
            assignment.deadline_ms = int(order.deadline_s * 1000)
            assignment.frame = order.frame
            assignment.counted_in = order.counted_in
            assignment.basis_digest = order.basis_digest
            assignment.base_revision = order.base_revision
            assignment.changed_since = order.changed_since
            assignment.base_digest = order.base_digest
            assignment.clip = order.clip
            return reply


def _state(state: UploadState, number: int = 0) -> pb.UploadState:
    return pb.UploadState(
        received_bytes=state.received_bytes,
        result="" if state.result is None else state.result.value,
        text=state.text,
        number=number,
    )
