"""A session over gRPC: one bidirectional stream.

gRPC cancels the whole stream when a task is cancelled that reads or writes it. So one task of the session's own
reads, for as long as the stream lives, and whoever iterates over the orders waits at a queue and may be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

import grpc.aio

from fedclient.transport.convert import (
    UnfitAssignment,
    assignment_from_wire,
    cancel_from_wire,
    event_to_wire,
    heartbeat_interval_s,
    upload_state_from_wire,
)
from fedclient.transport.errors import wire_errors
from fedcore.errors import FedError, Refused, Unreachable
from fedcore.messages import Assignment, Cancel, Decline, Heartbeat, SmallUpdate, UploadState
from fedproto.v1 import client_pb2

SEND_S: Final = 30.0
ANSWER_S: Final = 30.0
GOODBYE_S: Final = 2.0
# What a client may have waiting. A server that sends more without end is held back by flow control.
MAX_WAITING_ORDERS: Final = 64

_Call = grpc.aio.StreamStreamCall[client_pb2.SessionRequest, client_pb2.SessionReply]
_log: Final = logging.getLogger(__name__)


class GrpcSession:
    """See `Session`. The transport makes it, awaits `welcome`, and in the end `goodbye`."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._heartbeat_interval_s = 0.0
        self._orders: asyncio.Queue[Assignment | Cancel | FedError | None] = asyncio.Queue(MAX_WAITING_ORDERS)
        self._answers: dict[int, asyncio.Future[UploadState]] = {}
        self._num_sent = 0
        self._writing = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @property
    def heartbeat_interval_s(self) -> float:
        """See `Session.heartbeat_interval_s`."""
        return self._heartbeat_interval_s

    async def welcome(self) -> None:
        """Wait for the server's first message and start to listen.

        Raises:
            Refused: it is not a welcome.
        """
        reply = await self._call.read()
        if not isinstance(reply, client_pb2.SessionReply) or reply.WhichOneof("order") != "welcome":
            raise Refused("the server did not welcome this client: is it a Roundtable server?")
        self._heartbeat_interval_s = heartbeat_interval_s(reply.welcome)
        self._reader = asyncio.create_task(self._read(), name="session reader")

    async def orders(self) -> AsyncIterator[Assignment | Cancel]:
        """See `Session.orders`."""
        while (order := await self._orders.get()) is not None:
            if isinstance(order, FedError):
                raise order
            yield order

    async def send(self, event: Heartbeat | Decline | SmallUpdate) -> None:
        """See `Session.send`."""
        with wire_errors("room for a message to the server"):
            async with asyncio.timeout(SEND_S), self._writing:
                await self._call.write(event_to_wire(event))

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        """See `Transport.send_update`."""
        if self._reader is None or self._reader.done():
            raise Unreachable("the session is over")
        self._num_sent += 1
        number = self._num_sent
        answer: asyncio.Future[UploadState] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            # In a task of its own: whoever cancels us must not cancel the session.
            await asyncio.shield(asyncio.create_task(self.send(SmallUpdate(number, header, signature, frame))))
            with wire_errors("the answer to an update"):
                async with asyncio.timeout(ANSWER_S):
                    return await answer
        finally:
            del self._answers[number]
            answer.cancel()

    async def goodbye(self) -> None:
        """Close our side, give the server a moment to read what was sent and to close its own, then end the stream."""
        if self._reader is not None and not self._call.done():
            with suppress(FedError), wire_errors("the server's goodbye"):
                async with asyncio.timeout(GOODBYE_S):
                    await self._call.done_writing()
                    while isinstance(await self._orders.get(), Assignment | Cancel):
                        pass
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        end: FedError | None = None
        try:
            while True:
                with wire_errors("the next order"):
                    reply = await self._call.read()
                if not isinstance(reply, client_pb2.SessionReply):
                    break
                order = await self._order(reply)
                if order is not None:
                    await self._orders.put(order)
        except FedError as error:
            end = error
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unreachable(f"the session ended before the answer: {end or 'in good order'}"))
        await self._orders.put(end)

    async def _order(self, reply: client_pb2.SessionReply) -> Assignment | Cancel | None:
        match reply.WhichOneof("order"):
            case "assignment":
                try:
                    return assignment_from_wire(reply.assignment)
                except UnfitAssignment as error:
                    _log.warning("assignment not understood", extra={"reason": str(error)})
                    await self.send(Decline(reply.assignment.assignment_id[:64], str(error)))
            case "cancel":
                return cancel_from_wire(reply.cancel)
            case "upload":
                answer = self._answers.get(reply.upload.number)
                if answer is not None and not answer.done():
                    try:
                        answer.set_result(upload_state_from_wire(reply.upload))
                    except Refused as error:
                        answer.set_exception(error)
            case other:
                # A newer server may say more than we know; what must be answered comes as an assignment.
                _log.debug("order ignored", extra={"order": str(other)})
        return None
