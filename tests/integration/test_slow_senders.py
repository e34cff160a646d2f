"""Callers who keep a call open and send too little, or hold too much: on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from fedclient.identity import ClientIdentity
from fedclient.transport.channel import secure_channel
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import Refused, Unreachable, UpdateResult
from fedcore.identity import sign
from fedcore.layout import Layout
from fedcore.messages import CHUNK_BYTES, ERROR_CODE_KEY, SIGNATURE_CONTEXT, Assignment, Hello, UpdateHeader
from fedproto.v1 import client_pb2 as pb
from fedproto.v1 import client_pb2_grpc
from fedserver.rpc.gatekeeper import MAX_CALLS
from fedserver.rpc.patience import FIRST_MESSAGE_S, PROGRESS_S
from tests.support.hand_clock import HandClock
from tests.support.player import HELLO, RAW, Player, playing
from tests.support.server import TestServer, running_server, small_job

NUM_VALUES = 3 * CHUNK_BYTES // 4
LAYOUT = Layout.of([("adapter", "large", (NUM_VALUES,), "float32")])
LAYOUT_ROWS = [["adapter", "large", [NUM_VALUES], "float32"]]
UPDATE_ID = "0" * 32


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def server(tmp_path: Path, clock: HandClock) -> AsyncIterator[TestServer]:
    async with running_server(tmp_path, clock) as server:
        yield server


@asynccontextmanager
async def stub_of(identity: ClientIdentity) -> AsyncIterator[Any]:
    channel = secure_channel(identity.server, identity.ca_pem, identity.certificate_pem, identity.key_pem)
    try:
        yield client_pb2_grpc.ClientServiceStub(channel)
    finally:
        await channel.close(None)


async def ending(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends: its status, and the server's code for the error."""
    trailing = dict(await asyncio.wait_for(call.trailing_metadata(), 20))
    return await call.code(), str(trailing.get(ERROR_CODE_KEY))


def errors_counted(server: TestServer, code: str) -> float:
    registry = server.federation.services.metrics.registry
    return registry.get_sample_value("roundtable_rpc_errors_total", {"code": code}) or 0.0


async def is_served(identity: ClientIdentity) -> bool:
    transport = GrpcTransport(identity, SystemClock())
    try:
        return (await transport.upload_state(UPDATE_ID)).received_bytes == 0
    finally:
        await transport.close()


# -- no first message ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Session", "Upload", "GetUpload", "Download"])
async def test_a_call_without_a_message_is_ended(server: TestServer, clock: HandClock, method: str) -> None:
    identity = await server.enrol("alice")
    channel = secure_channel(identity.server, identity.ca_pem, identity.certificate_pem, identity.key_pem)
    # On the wire every call is a stream; a client that sends its one message late looks like this.
    start: Any = channel.stream_stream
    call = start(f"/fedproto.v1.ClientService/{method}")()
    await clock.wait_for_sleepers(FIRST_MESSAGE_S)
    clock.advance(FIRST_MESSAGE_S - 1)
    assert await is_served(identity)
    assert not call.done()
    clock.advance(1)
    assert await ending(call) == (grpc.StatusCode.UNAVAILABLE, "unreachable")
    assert errors_counted(server, "unreachable") == 1
    assert await is_served(identity)
    await channel.close(None)


async def test_a_stranger_at_the_enrolment_port_is_ended_too(server: TestServer, clock: HandClock) -> None:
    channel = secure_channel(f"localhost:{server.rpc.enrolment_port}", server.authority.ca_pem)
    start: Any = channel.stream_unary
    call = start("/fedproto.v1.EnrolmentService/Enrol")()
    await clock.wait_for_sleepers(FIRST_MESSAGE_S)
    clock.advance(FIRST_MESSAGE_S)
    assert await ending(call) == (grpc.StatusCode.UNAVAILABLE, "unreachable")
    await channel.close(None)
    await server.enrol("alice")


# -- a slow upload ---------------------------------------------------------------------------------------------------


async def assigned(server: TestServer, identity: ClientIdentity) -> tuple[Assignment, UpdateHeader, bytes]:
    """Return work for a large update, with the update; its client has gone since, and will send it."""
    await server.federation.submit(small_job(deadline_s=3600.0).to_json())
    transport = GrpcTransport(identity, SystemClock())
    async with playing(transport, identity.signing_key) as player:
        work = await player.next_work()
        header, frame = large_update(player, work)
    await transport.close()
    return work, header, frame


def large_update(player: Player, work: Assignment) -> tuple[UpdateHeader, bytes]:
    frame = RAW.encode(np.zeros(NUM_VALUES, np.float32), np.random.default_rng(0))
    return player.header(work, frame, layout=LAYOUT_ROWS, layout_digest=LAYOUT.digest), frame


async def opened(stub: Any, identity: ClientIdentity, header: UpdateHeader, offset: int = 0) -> Any:
    data = header.to_bytes()
    signature = sign(identity.signing_key, SIGNATURE_CONTEXT, data)
    call = stub.Upload()
    await call.write(pb.UploadRequest(opening=pb.UploadOpening(header=data, signature=signature, offset=offset)))
    return call


async def send(call: Any, frame: bytes, start: int, num_bytes: int) -> None:
    await call.write(pb.UploadRequest(chunk=pb.Chunk(offset=start, data=frame[start : start + num_bytes])))


def spooled_bytes(server: TestServer) -> int:
    return sum(server.federation.services.blobs.spools().values())


async def received(server: TestServer, num_bytes: int) -> None:
    """Return when so many bytes of uploads are in spools, which nothing announces."""
    async with asyncio.timeout(20):
        while spooled_bytes(server) < num_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_an_upload_byte_by_byte_is_ended_and_can_be_resumed(server: TestServer, clock: HandClock) -> None:
    identity = await server.enrol("alice")
    _, header, frame = await assigned(server, identity)
    async with stub_of(identity) as stub:
        call = await opened(stub, identity, header)
        await clock.wait_for_sleepers(PROGRESS_S)
        for start in range(5):  # a byte every eleven seconds: the stream is never idle for long
            before = clock.num_sleeps
            clock.advance(11)
            await send(call, frame, start, 1)
            await clock.wait_for_sleepers(PROGRESS_S - 11 * (start + 1), after=before)
        assert spooled_bytes(server) == 5
        clock.advance(PROGRESS_S - 55)
        assert await ending(call) == (grpc.StatusCode.UNAVAILABLE, "unreachable")
    assert errors_counted(server, "unreachable") == 1
    transport = GrpcTransport(identity, SystemClock())
    data = header.to_bytes()
    state = await transport.upload_state(header.update_id)
    assert state.received_bytes == 5
    state = await transport.upload(data, sign(identity.signing_key, SIGNATURE_CONTEXT, data), frame, 5)
    assert state.result is UpdateResult.ACCEPTED
    await transport.close()


async def test_an_upload_on_a_bad_line_is_let_be(server: TestServer, clock: HandClock) -> None:
    identity = await server.enrol("alice")
    _, header, frame = await assigned(server, identity)
    async with stub_of(identity) as stub:
        call = await opened(stub, identity, header)
        for start in range(0, len(frame), CHUNK_BYTES):
            await clock.wait_for_sleepers(PROGRESS_S)
            clock.advance(PROGRESS_S - 1)
            await send(call, frame, start, CHUNK_BYTES)
        await call.done_writing()
        state = await asyncio.wait_for(call, 20)
    assert state.result == "accepted"


async def test_the_space_of_an_abandoned_upload_is_given_back_when_its_attempt_ends(
    server: TestServer, clock: HandClock
) -> None:
    identity = await server.enrol("alice")
    work, header, frame = await assigned(server, identity)
    async with stub_of(identity) as stub:
        call = await opened(stub, identity, header)
        await send(call, frame, 0, CHUNK_BYTES)
        await received(server, CHUNK_BYTES)
        call.cancel()
    clock.advance(3600)
    async with asyncio.timeout(20):
        while spooled_bytes(server):
            await server.federation.next_change().wait()
    engine = server.federation.engines[work.job_id]
    assert engine.state.abandoned == 1


# -- too much at once ------------------------------------------------------------------------------------------------


async def test_a_client_has_a_bounded_number_of_calls_over_all_its_connections(
    server: TestServer, clock: HandClock
) -> None:
    alice, bob = await server.enrol("alice"), await server.enrol("bob")
    async with stub_of(alice) as one, stub_of(alice) as other:
        held = [stub.Upload() for stub in (one, other) for _ in range(MAX_CALLS // 2)]
        await clock.wait_for_sleepers(FIRST_MESSAGE_S, MAX_CALLS)
        for stub in (one, other):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetUpload(pb.GetUploadRequest(update_id=UPDATE_ID))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        transport = GrpcTransport(alice, SystemClock())
        with pytest.raises(Unreachable, match=f"{MAX_CALLS} calls open"):  # which a client tries again
            await transport.upload_state(UPDATE_ID)
        assert errors_counted(server, "busy") == 3
        assert await is_served(bob)
        held[0].cancel()
        async with asyncio.timeout(20):
            while True:
                try:
                    await transport.upload_state(UPDATE_ID)
                    break
                except Unreachable:
                    pass
        await transport.close()
    assert await is_served(alice)


@pytest.mark.parametrize(
    "hello",
    [
        Hello("s", "d", ("../../etc/passwd",), (), ()),
        Hello("s", "d", (), ("full\n",), ()),
        Hello("s", "d", (), (), ("raw", "x" * 65)),
        Hello("s", "d", ("",), (), ()),
        Hello("s", "d", (), (), (), ("A" * 32,)),
        Hello("s", "d", (), (), (), ("a" * 33,)),
        Hello("s", "d", ("a",) * 1001, (), ()),
    ],
    ids=lambda hello: repr(hello)[10:60],
)
async def test_a_hello_with_names_that_are_none_is_refused(server: TestServer, hello: Hello) -> None:
    identity = await server.enrol("alice")
    transport = GrpcTransport(identity, SystemClock())
    with pytest.raises(Refused):
        async with transport.connect(hello):
            pass
    assert server.federation.fleet.seats == {}
    async with transport.connect(HELLO):
        assert list(server.federation.fleet.seats) == ["alice"]
    await transport.close()
