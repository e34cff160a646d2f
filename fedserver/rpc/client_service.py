"""ClientService: decode, call the federation, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fedcore.errors import FedError, InvalidInput, UpdateRejected, UpdateResult
from fedcore.messages import CHUNK_BYTES, Assignment, Cancel, Decline, Heartbeat, Hello, UploadState, WorkKind
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc as pb_grpc
from fedserver.federation import HEARTBEAT_INTERVAL_S, Federation
from fedserver.rounds import intake as updates
from fedserver.rounds.fleet import Seat
from fedserver.rpc.gatekeeper import Context, caller_name, check_again
from fedserver.rpc.unknown_fields import refuse_unknown_fields

KINDS = {
    WorkKind.INITIALISE: pb.WORK_KIND_INITIALISE,
    WorkKind.TRAIN: pb.WORK_KIND_TRAIN,
    WorkKind.EVALUATE: pb.WORK_KIND_EVALUATE,
}
MAX_NAMES = 1000


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
        refuse_unknown_fields(first)
        seat = self._federation.join(caller_name(), _hello(first.hello))
        listening = asyncio.create_task(self._listen(seat, requests))
        try:
            yield pb.SessionReply(welcome=pb.Welcome(heartbeat_interval_ms=int(HEARTBEAT_INTERVAL_S * 1000)))
            async for order in seat.orders():
                yield _order(order)
        finally:
            listening.cancel()
            self._federation.leave(seat)

    async def _listen(self, seat: Seat, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Take what the client says, until it has no more to say or says what it may not."""
        reason: FedError | None = None
        try:
            async for request in requests:
                check_again()
                refuse_unknown_fields(request)
                await self._federation.heard(seat, _event(request))
        except FedError as error:
            reason = error
        finally:
            self._federation.fleet.leave(seat, reason)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        refuse_unknown_fields(request)
        frame = self._federation.frame(request.job_id, request.version)
        if request.offset > len(frame):
            raise InvalidInput(f"offset {request.offset}, the frame has {len(frame)} bytes")
        for start in range(request.offset, len(frame), CHUNK_BYTES):
            check_again()
            data = bytes(frame[start : start + CHUNK_BYTES])
            yield pb.Chunk(offset=start, data=data)
            self._federation.sent(request.job_id, len(data))

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.UploadState:
        refuse_unknown_fields(request)
        return _state(await self._federation.intake.state_of(caller_name(), request.update_id))

    async def SendUpdate(self, request: pb.SendUpdateRequest, context: Context) -> pb.UploadState:
        intake = self._federation.intake
        try:
            refuse_unknown_fields(request)
            num_bytes = len(request.header) + len(request.frame)
            if num_bytes > CHUNK_BYTES:
                raise InvalidInput(f"header and frame have {num_bytes} bytes, at most {CHUNK_BYTES} in one message")
            announced = await intake.announce(caller_name(), request.header, request.signature)
            if isinstance(announced, UploadState):
                return _state(announced)
            return _state(await intake.send(announced, request.frame))
        except UpdateRejected as error:
            return _state(UploadState(0, error.reason, str(error)))

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: Context) -> pb.UploadState:
        intake = self._federation.intake
        try:
            first = await anext(aiter(requests), None)
            if first is None or first.WhichOneof("part") != "opening":
                raise UpdateRejected(UpdateResult.MALFORMED, "an upload starts with its opening")
            refuse_unknown_fields(first)
            announced = await intake.announce(caller_name(), first.opening.header, first.opening.signature)
            if isinstance(announced, UploadState):
                return _state(announced)
            upload = intake.upload(announced)
            if first.opening.offset != upload.num_bytes:
                return _state(UploadState(upload.num_bytes))
            return _state(await self._receive(upload, requests))
        except UpdateRejected as error:
            return _state(UploadState(0, error.reason, str(error)))

    async def _receive(self, upload: updates.Upload, requests: AsyncIterator[pb.UploadRequest]) -> UploadState:
        async for request in requests:
            check_again()
            refuse_unknown_fields(request)
            if request.WhichOneof("part") != "chunk" or len(request.chunk.data) > CHUNK_BYTES:
                raise UpdateRejected(UpdateResult.MALFORMED, f"expected a chunk of at most {CHUNK_BYTES} bytes")
            await upload.append(request.chunk.offset, request.chunk.data)
        return await upload.finish() if upload.complete else UploadState(upload.num_bytes)


def _hello(hello: pb.Hello) -> Hello:
    for name in ("tasks", "adapters", "codecs", "assignment_ids"):
        if len(getattr(hello, name)) > MAX_NAMES:
            raise InvalidInput(f"hello names {len(getattr(hello, name))} {name}, at most {MAX_NAMES}")
    return Hello(
        hello.software[:100],
        hello.device[:100],
        tuple(hello.tasks),
        tuple(hello.adapters),
        tuple(hello.codecs),
        tuple(hello.assignment_ids),
    )


def _event(request: pb.SessionRequest) -> Heartbeat | Decline:
    match request.WhichOneof("event"):
        case "heartbeat":
            return Heartbeat(request.heartbeat.assignment_id, request.heartbeat.progress)
        case "decline":
            decline = request.decline
            return Decline(decline.assignment_id, decline.reason, decline.transient)
        case other:
            raise InvalidInput(f"{other or 'nothing'} is not said during a session")


def _order(order: Assignment | Cancel) -> pb.SessionReply:
    match order:
        case Cancel(assignment_id, reason):
            return pb.SessionReply(cancel=pb.Cancel(assignment_id=assignment_id, reason=reason))
        case Assignment():
            return pb.SessionReply(
                assignment=pb.Assignment(
                    assignment_id=order.assignment_id,
                    job_id=order.job_id,
                    job=order.job,
                    version=order.version,
                    kind=KINDS[order.kind],
                    seed=order.seed,
                    layout_digest=order.layout_digest,
                    frame_digest=order.frame_digest,
                    frame_bytes=order.frame_bytes,
                    deadline_ms=int(order.deadline_s * 1000),
                )
            )


def _state(state: UploadState) -> pb.UploadState:
    return pb.UploadState(
        received_bytes=state.received_bytes, result="" if state.result is None else state.result.value, text=state.text
    )
