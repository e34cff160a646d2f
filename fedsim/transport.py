"""The in-process transport: the contract of `fedclient.transport.base`, straight into a `Federation`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedclient.pieces import Pieces
from fedcore.errors import UpdateRejected
from fedcore.messages import CHUNK_BYTES, Answer, Assignment, Cancel, Decline, Heartbeat, Hello, Piece, UploadState
from fedserver.federation import HEARTBEAT_INTERVAL_S, Federation
from fedserver.rounds.fleet import Seat
from fedserver.rounds.intake import Announced


class InProcessSession:
    """See `fedclient.transport.base.Session`."""

    heartbeat_interval_s = HEARTBEAT_INTERVAL_S

    def __init__(self, federation: Federation, seat: Seat) -> None:
        self._federation = federation
        self._seat = seat

    async def orders(self) -> AsyncIterator[Assignment | Cancel]:
        """See `Session.orders`."""
        async for order in self._federation.orders(self._seat):
            if not isinstance(order, Answer):
                yield order

    async def send(self, event: Heartbeat | Decline) -> None:
        """See `Session.send`."""
        await self._federation.heard(self._seat, event)


class InProcessTransport:
    """See `fedclient.transport.base.Transport`. The client's name is true because the simulator says so."""

    def __init__(self, federation: Federation, client: str) -> None:
        self.federation = federation.federation
        self.client = client
        self._server = federation

    @asynccontextmanager
    async def connect(self, hello: Hello) -> AsyncIterator[InProcessSession]:
        """See `Transport.connect`."""
        seat = self._server.join(self.client, hello)
        try:
            yield InProcessSession(self._server, seat)
        finally:
            self._server.leave(seat)

    async def download(
        self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME
    ) -> AsyncIterator[bytes]:
        """See `Transport.download`."""
        async for chunk in self._server.piece(job_id, version, piece, offset):
            yield chunk

    async def upload_state(self, update_id: str) -> UploadState:
        """See `Transport.upload_state`."""
        return await self._server.intake.state_of(self.client, update_id)

    async def upload(self, header: bytes, signature: bytes, frame: bytes | Pieces, offset: int) -> UploadState:
        """See `Transport.upload`."""
        announced = await self._announce(header, signature)
        if isinstance(announced, UploadState):
            return announced
        upload = self._server.intake.upload(announced)
        if offset != (held := await upload.resume()):
            return UploadState(held)
        try:
            for start in range(offset, len(frame), CHUNK_BYTES):
                await upload.append(start, frame[start : start + CHUNK_BYTES])
        except UpdateRejected as error:
            return UploadState(0, error.reason, str(error))
        return await upload.finish() if upload.complete else UploadState(upload.num_bytes)

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        """See `Transport.send_update`."""
        return await self._server.intake.send(self.client, header, signature, frame)

    async def close(self) -> None:
        """See `Transport.close`."""

    async def _announce(self, header: bytes, signature: bytes) -> Announced | UploadState:
        try:
            return await self._server.intake.announce(self.client, header, signature)
        except UpdateRejected as error:
            return UploadState(0, error.reason, str(error))
