"""The transport over gRPC with mutual TLS. `Transport` in base.py says what each method promises.

Deadlines: a small call has `ANSWER_S`; a stream has `PROGRESS_S` between two chunks, for a large transfer over a slow
line is no fault; a session is watched by keepalive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio

from fedclient.identity import ClientIdentity
from fedclient.pieces import Pieces
from fedclient.transport.channel import secure_channel
from fedclient.transport.convert import PIECES, hello_to_wire, upload_state_from_wire
from fedclient.transport.errors import wire_errors
from fedclient.transport.grpc_session import GrpcSession
from fedcore.clock import Clock
from fedcore.errors import NotFound, Unreachable
from fedcore.messages import CHUNK_BYTES, Hello, Piece, UploadState
from fedproto.v1 import client_pb2, client_pb2_grpc

ANSWER_S: Final = 30.0
PROGRESS_S: Final = 30.0
DURABLE_S: Final = 120.0
"""For the server to make a large upload durable and to look at it."""

_log: Final = logging.getLogger(__name__)


class GrpcTransport:
    """One client's connection to its server; it dials on first use, on the event loop of that use.

    Args:
        identity: who we are, whom we trust.
        clock: tells whether the certificate is valid now.
        server: HOST:PORT to dial instead of the one in `identity`.
    """

    def __init__(self, identity: ClientIdentity, clock: Clock, server: str | None = None) -> None:
        self.federation = identity.federation
        self.client = identity.client
        self._identity = identity
        self._clock = clock
        self._server = server or identity.server
        self._channel: grpc.aio.Channel | None = None
        self._session: GrpcSession | None = None

    @asynccontextmanager
    async def connect(self, hello: Hello) -> AsyncIterator[GrpcSession]:
        """See `Transport.connect`."""
        # The server refuses an expired certificate within the handshake, of which gRPC tells us nothing.
        self._identity.check(self._clock.wall_s())
        with wire_errors("the server"):
            call = self._stub().Session(None)
        session = GrpcSession(call)
        try:
            with wire_errors(f"the welcome of {self._server}"):
                async with asyncio.timeout(ANSWER_S):
                    await call.write(hello_to_wire(hello))
                    await session.welcome()
            self._session = session
            yield session
        finally:
            if self._session is session:
                self._session = None
            await session.goodbye()

    async def download(
        self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME
    ) -> AsyncIterator[bytes]:
        """See `Transport.download`."""
        request = client_pb2.DownloadRequest(job_id=job_id, version=version, piece=PIECES[piece], offset=offset)
        with wire_errors("the server"):
            call = self._stub().Download(request)
        try:
            while True:
                with wire_errors("the next chunk of a download"):
                    async with asyncio.timeout(PROGRESS_S):
                        chunk = await call.read()
                if not isinstance(chunk, client_pb2.Chunk):
                    return
                if chunk.offset != offset:
                    raise Unreachable(f"a chunk came for offset {chunk.offset}, expected {offset}")
                offset += len(chunk.data)
                yield chunk.data
        finally:
            call.cancel()

    async def upload_state(self, update_id: str) -> UploadState:
        """See `Transport.upload_state`."""
        try:
            with wire_errors("the state of an upload"):
                async with asyncio.timeout(ANSWER_S):
                    reply = await self._stub().GetUpload(client_pb2.GetUploadRequest(update_id=update_id))
        except NotFound:
            return UploadState(0)
        return upload_state_from_wire(reply)

    async def upload(self, header: bytes, signature: bytes, frame: bytes | Pieces, offset: int) -> UploadState:
        """See `Transport.upload`."""
        with wire_errors("the server"):
            call = self._stub().Upload(None)
        try:
            opening = client_pb2.UploadOpening(header=header, signature=signature, offset=offset)
            going_on = await self._write(call, client_pb2.UploadRequest(opening=opening))
            while going_on and offset < len(frame):  # gRPC's flow control paces this loop
                data = frame[offset : offset + CHUNK_BYTES]
                request = client_pb2.UploadRequest()
                request.chunk.offset, request.chunk.data = offset, data
                going_on = await self._write(call, request)
                offset += len(data)
            with wire_errors("the answer to an upload"):
                async with asyncio.timeout(DURABLE_S):
                    await call.done_writing()
                    return upload_state_from_wire(await call)
        finally:
            call.cancel()

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        """See `Transport.send_update`."""
        if self._session is None:
            raise Unreachable("there is no session")
        return await self._session.send_update(header, signature, frame)

    async def close(self) -> None:
        """See `Transport.close`."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def _write(
        self,
        call: grpc.aio.StreamUnaryCall[client_pb2.UploadRequest, client_pb2.UploadState],
        request: client_pb2.UploadRequest,
    ) -> bool:
        """Send one part; False if the server has answered already and wants no more."""
        if call.done():
            return False
        with wire_errors("room for the next chunk of an upload"):
            async with asyncio.timeout(PROGRESS_S):
                try:
                    await call.write(request)
                except asyncio.InvalidStateError:
                    return False
        return True

    def _stub(self) -> client_pb2_grpc.ClientServiceAsyncStub:
        if self._channel is None:
            identity = self._identity
            self._channel = secure_channel(self._server, identity.ca_pem, identity.certificate_pem, identity.key_pem)
            _log.debug("channel opened", extra={"server": self._server})
        return client_pb2_grpc.ClientServiceStub(self._channel)
