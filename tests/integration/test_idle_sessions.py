"""What the server holds for a client that has its work and is busy with it."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.transport.channel import secure_channel
from fedclient.transport.convert import hello_to_wire
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import UpdateResult
from fedcore.layout import Layout
from fedcore.messages import Assignment
from fedproto.v1 import client_pb2 as pb
from tests.support.player import HELLO, RAW, playing
from tests.support.server import TestServer, running_server, small_job

WIDE = Layout.of([("adapter", "w", (1 << 18,), "float32")])
NUM_CLIENTS = 3


async def make_version(server: TestServer) -> None:
    """Let a client make version 0, of 1 MiB, and leave."""
    identity = await server.enrol("first")
    transport = GrpcTransport(identity, SystemClock())
    async with playing(transport, identity.signing_key) as player:
        work = await player.next_work()
        frame = RAW.encode(np.ones(WIDE.num_values, np.float32), np.random.default_rng(0))
        tensors = [[t.group, t.name, list(t.shape), t.dtype] for t in WIDE.tensors]
        state = await player.send(player.header(work, frame, layout=tensors, layout_digest=WIDE.digest), frame)
        assert state.result is UpdateResult.ACCEPTED
    await transport.close()


def held_by_sessions() -> list[object]:
    """Return every assignment with a frame in this process: as the server thinks of it, and as a message."""
    gc.collect()  # of other tests
    things = gc.get_objects()
    # By `type`: `isinstance` asks the thing, and some things of other libraries warn when they are asked.
    found: list[object] = [thing for thing in things if type(thing) is Assignment and thing.frame]
    return found + [thing for thing in things if type(thing) is pb.SessionReply and thing.assignment.frame]


async def test_no_session_holds_the_frame_while_its_client_works(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server, AsyncExitStack() as stack:
        await server.federation.submit(small_job(cohort=NUM_CLIENTS).to_json())
        await make_version(server)
        calls = []
        for i in range(NUM_CLIENTS):
            identity = await server.enrol(f"client-{i}")
            channel = secure_channel(server.address, identity.ca_pem, identity.certificate_pem, identity.key_pem)
            await stack.enter_async_context(channel)
            call: Any = channel.stream_stream(
                "/fedproto.v1.ClientService/Session", pb.SessionRequest.SerializeToString, bytes
            )(None)  # replies are not parsed here: every message that is found in this process is the server's
            await call.write(hello_to_wire(HELLO))
            calls.append(call)
        for call in calls:
            while len(await call.read()) < 4 * WIDE.num_values:
                pass
        async with asyncio.timeout(20):
            while held_by_sessions():  # the server may still be about to wait for its next order
                heard = server.federation.next_change()
                await calls[0].write(pb.SessionRequest(heartbeat=pb.Heartbeat()))
                await heard.wait()
