"""What a round sends, without a round: `python -m benchmarks.wire_client ADDRESS BYTES ROUNDS FOLDER...`.

Clients of the bare server, each on a connection of its own: in each round one frame of BYTES comes down and one goes
up, within the session if it is small, else as a download and an upload in chunks. ADDRESS without TLS:
`plain:HOST:PORT`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio

from fedclient.identity import ClientIdentity
from fedclient.transport.channel import OPTIONS, secure_channel
from fedcore.messages import CHUNK_BYTES, MESSAGE_BYTES
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc as pb_grpc


async def exchange(address: str, folder: Path, num_bytes: int, rounds: int) -> None:
    """Send and receive one client's frames."""
    if address.startswith("plain:"):
        channel = grpc.aio.insecure_channel(address.removeprefix("plain:"), options=OPTIONS)
    else:
        identity = ClientIdentity.load(folder)
        channel = secure_channel(address, identity.ca_pem, identity.certificate_pem, identity.key_pem)
    async with channel:
        stub = pb_grpc.ClientServiceStub(channel)
        if num_bytes > MESSAGE_BYTES:
            for _ in range(rounds):
                async for _ in stub.Download(pb.DownloadRequest(version=num_bytes)):
                    pass
                await stub.Upload(_parts(num_bytes))
            return
        session, frame = stub.Session(None), bytes(num_bytes)
        await session.write(pb.SessionRequest(hello=pb.Hello()))
        await session.read()
        for number in range(rounds):
            await session.write(pb.SessionRequest(update=pb.Update(number=number, frame=frame)))
            await session.read()
        await session.done_writing()


async def _parts(num_bytes: int) -> AsyncIterator[pb.UploadRequest]:
    data = bytes(CHUNK_BYTES)
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield pb.UploadRequest(chunk=pb.Chunk(offset=start, data=data))


async def main(address: str, num_bytes: int, rounds: int, folders: list[Path]) -> None:
    """Run all clients at once to their end."""
    await asyncio.gather(*(exchange(address, folder, num_bytes, rounds) for folder in folders))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(folder) for folder in sys.argv[4:]]))
