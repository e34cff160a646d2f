"""The contract between a client and whatever carries its messages.

Two implementations: gRPC (`fedclient.transport.grpc_transport`) and the simulator's, in process. Both pass
`tests/contract`. Everything here is called on the runner's event loop; calls for different updates and versions
may overlap, and transfers go on while a session is open, or while there is none.

Each call ends: it answers, or raises `Unreachable` when nothing moves for a while. `Unreachable` is the only error
that is worth another try.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from fedclient.pieces import Pieces
from fedcore.messages import Assignment, Cancel, Decline, Heartbeat, Hello, Piece, UploadState


class Session(Protocol):
    """The client's presence at the server: from `Transport.connect` to the end of its block or of the connection."""

    @property
    def heartbeat_interval_s(self) -> float:
        """Seconds between two heartbeats, as the server wishes; a client that is silent for longer counts as lost."""
        ...

    def orders(self) -> AsyncIterator[Assignment | Cancel]:
        """Iterate over what the server wants, in its order. One iteration a session.

        Ends when the server closes the session in good order.

        Raises:
            Unreachable: the connection broke.
            Unauthenticated: the client is no longer welcome.
        """
        ...

    async def send(self, event: Heartbeat | Decline) -> None:
        """Tell the server something. Not acknowledged: what must arrive is sent again after reconnecting.

        Raises:
            Unreachable: the connection is broken.
            Unauthenticated: the client is no longer welcome.
        """
        ...


class Transport(Protocol):
    """One client's way to one server.

    Attributes:
        federation: the server's federation id, from the client's certificate.
        client: the client's name, from its certificate.
    """

    federation: str
    client: str

    def connect(self, hello: Hello) -> AbstractAsyncContextManager[Session]:
        """Open a session; entering waits for the server's welcome. Leaving says goodbye if the connection still holds.

        Raises:
            Unreachable: nobody answers in time.
            Unauthenticated: no or a refused certificate.
        """
        ...

    def download(self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME) -> AsyncIterator[bytes]:
        """Iterate over a piece of a version from `offset` to its end, in chunks of at most `CHUNK_BYTES`.

        An early end is an error: the iterator raises rather than stop short because of a broken connection.

        Raises:
            NotFound: no such job or version, or it has no such piece.
            Unreachable: the connection broke or no chunk came for a while; go on from where it stopped.
        """
        ...

    async def upload_state(self, update_id: str) -> UploadState:
        """Return how far an upload is; `received_bytes` is 0 for one that the server has never seen.

        Raises:
            Unreachable: nobody answers in time.
        """
        ...

    async def upload(self, header: bytes, signature: bytes, frame: bytes | Pieces, offset: int) -> UploadState:
        """Send `frame` from `offset` to its end in chunks and return what the server made of it.

        A rejected update is not an error: the state says so, and the answer is durable.

        Raises:
            Refused: the server does not take the upload at all; the text says why.
            Unreachable: the connection broke or nothing moved for a while; ask `upload_state` and go on from there.
        """
        ...

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        """Send a small update (`header` and `frame` together at most `MESSAGE_BYTES`) within the open session.

        Raises:
            Refused: as for `upload`.
            Unreachable: no session, or no answer; sending the same bytes again is safe.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection. Calling it again does nothing."""
        ...
