"""A server, or something before it, that resets streams: to a client that is a broken line, and it tries again."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import Unreachable
from tests.support import http2
from tests.support.player import HELLO
from tests.support.processes import Deployment
from tests.support.server import running_server

CODES = {
    "NO_ERROR": http2.NO_ERROR,
    "INTERNAL_ERROR": http2.INTERNAL_ERROR,
    "REFUSED_STREAM": http2.REFUSED_STREAM,
    "CANCEL": http2.CANCEL,
    "ENHANCE_YOUR_CALM": http2.ENHANCE_YOUR_CALM,
}
UPDATE_ID = "0" * 32


@asynccontextmanager
async def resetting(
    keys: Path, code: int, port: int = 0, heard: Callable[[], None] = lambda: None
) -> AsyncIterator[int]:
    """Answer every call with a reset, with the server's certificate; yield the port."""

    connections: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[asyncio.current_task()] = writer
        try:
            await reader.readexactly(len(http2.PREFACE))
            writer.write(http2.frame(http2.SETTINGS, 0, 0))
            while True:
                head = await reader.readexactly(9)
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await reader.readexactly(int.from_bytes(head[:3]))
                if kind in {http2.SETTINGS, http2.PING} and not flags & http2.ACK:
                    writer.write(http2.frame(kind, http2.ACK, 0, payload if kind == http2.PING else b""))
                elif kind == http2.HEADERS:
                    writer.write(http2.reset(stream, code))
                    heard()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    context.set_alpn_protocols(["h2"])
    server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in connections.values():
            writer.close()
        await asyncio.gather(*filter(None, connections))


@pytest.mark.parametrize("code", CODES)
async def test_a_reset_is_worth_another_try(tmp_path: Path, code: str) -> None:
    async with running_server(tmp_path) as server, resetting(tmp_path / "keys", CODES[code]) as port:
        identity = await server.enrol("alice")
        transport = GrpcTransport(identity, SystemClock(), f"localhost:{port}")
        with pytest.raises(Unreachable):
            async with transport.connect(HELLO):
                pass
        with pytest.raises(Unreachable):
            await transport.upload_state(UPDATE_ID)
        with pytest.raises(Unreachable):
            await transport.upload(b"{}", bytes(64), bytes(100), 0)
        with pytest.raises(Unreachable):
            await anext(transport.download(UPDATE_ID, 0, 0))
        await transport.close()


@pytest.mark.slow
async def test_a_client_process_tries_until_a_server_serves_it(tmp_path: Path) -> None:
    with Deployment(tmp_path) as deployment:
        await asyncio.to_thread(deployment.start_server)
        port = int(deployment.ready["address"].rpartition(":")[2])
        await asyncio.to_thread(deployment.enrol, "alice")
        await asyncio.to_thread(deployment.server.stop)
        resets = asyncio.Semaphore(0)
        async with resetting(deployment.state / "keys", http2.CANCEL, port, resets.release):
            client = deployment.start_client("alice", {"shard": 0, "num_shards": 1})
            async with asyncio.timeout(60):
                for _ in range(3):
                    await resets.acquire()
            assert client.is_running
        await asyncio.to_thread(deployment.start_server)
        await asyncio.to_thread(client.wait_for_event, "connected")
