"""The floor: a bare grpc.aio server that speaks the client's protocol and does nothing with what it hears.

`python -m benchmarks.bare_server STATE_FOLDER`: mutual TLS with the folder's certificates, and a second port without
TLS; prints both ports as JSON. Sessions are welcomed and heard, uploads read and thrown away, downloads are zeros of
the length that `version` asks for. What a real server costs beyond this is ours; this much is gRPC's.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from grpc import aio

from fedcore.messages import CHUNK_BYTES
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc as pb_grpc
from fedserver.rpc.gatekeeper import Context
from fedserver.rpc.server import MAIN_OPTIONS
from fedserver.security.authority import Authority

HEARTBEAT_INTERVAL_MS = 10_000


class BareService(pb_grpc.ClientServiceServicer):
    """See the module's text."""

    def __init__(self) -> None:
        self._chunk = bytes(CHUNK_BYTES)

    async def Session(  # noqa: N802, D102
        self, requests: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncIterator[pb.SessionReply]:
        await anext(aiter(requests))
        yield pb.SessionReply(welcome=pb.Welcome(heartbeat_interval_ms=HEARTBEAT_INTERVAL_MS))
        async for request in requests:
            if request.WhichOneof("event") == "update":  # answered with as much as came: an assignment with its frame
                yield pb.SessionReply(assignment=pb.Assignment(frame=request.update.frame))

    async def Download(self, request: pb.DownloadRequest, context: Context) -> AsyncIterator[pb.Chunk]:  # noqa: N802, D102
        for start in range(0, request.version, CHUNK_BYTES):
            yield pb.Chunk(offset=start, data=self._chunk)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.UploadState:  # noqa: N802, D102
        return pb.UploadState()

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: Context) -> pb.UploadState:  # noqa: N802, D102
        received = 0
        async for request in requests:
            received += len(request.chunk.data)
        return pb.UploadState(received_bytes=received)


async def main(state: Path) -> None:
    """Serve until the process is stopped."""
    authority = Authority.load(state / "keys")
    server = aio.server(options=list(MAIN_OPTIONS.items()))
    pb_grpc.add_ClientServiceServicer_to_server(BareService(), server)
    pairs = [(authority.server_key_pem, authority.server_chain_pem)]
    credentials = grpc.ssl_server_credentials(pairs, authority.ca_pem, require_client_auth=True)
    secure_port = server.add_secure_port("127.0.0.1:0", credentials)
    plain_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(json.dumps({"secure": f"localhost:{secure_port}", "plain": f"localhost:{plain_port}"}) + "\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
