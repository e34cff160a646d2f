"""What every transport must do: gRPC over mutual TLS, and the simulator's in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.transport.base import Transport
from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import FedError, NotFound, Unreachable, UpdateResult
from fedcore.identity import sign
from fedcore.layout import Layout
from fedcore.messages import CHUNK_BYTES, SIGNATURE_CONTEXT, Assignment, Cancel, Decline, WorkKind
from fedsim.transport import InProcessTransport
from tests.support.player import LAYOUT, RAW, Player, playing
from tests.support.server import TestServer, running_server, small_job


@dataclass
class Peer:
    server: TestServer
    transport: Transport
    key: Ed25519PrivateKey

    async def submit(self, **options: object) -> str:
        record = await self.server.federation.submit(small_job(**options).to_json())  # type: ignore[arg-type]
        return record.job_id


@pytest.fixture(params=["grpc", "in process"])
async def peer(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Peer]:
    async with running_server(tmp_path) as server:
        identity = await server.enrol("alice")
        transport: Transport
        if request.param == "grpc":
            transport = GrpcTransport(identity, SystemClock())
        else:
            transport = InProcessTransport(server.federation, "alice")
        yield Peer(server, transport, identity.signing_key)
        await transport.close()


async def begin(player: Player) -> None:
    """Answer the first assignment, which asks for version 0."""
    work = await player.next_work()
    assert work.kind is WorkKind.INITIALISE
    assert (await player.answer(work)).result is UpdateResult.ACCEPTED


async def test_a_job_goes_from_initialisation_through_training_to_evaluation(peer: Peer) -> None:
    job_id = await peer.submit(rounds=2)
    delta_D = np.arange(LAYOUT.num_values, dtype=np.float32)
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        for version in (0, 1):
            work = await player.next_work()
            assert (work.kind, work.version) == (WorkKind.TRAIN, version)
            assert (await player.download(work)).tolist() == (version * delta_D).tolist()
            assert (await player.answer(work, delta_D)).result is UpdateResult.ACCEPTED
        work = await player.next_work()
        assert (work.kind, work.version) == (WorkKind.EVALUATE, 2)
        assert (await player.download(work)).tolist() == (2 * delta_D).tolist()
        assert (await player.answer(work)).result is UpdateResult.ACCEPTED
        while job_id in peer.server.federation.engines:
            await peer.server.federation.next_change().wait()
    assert peer.server.federation.job(job_id).status == "finished"


async def test_a_download_resumes_at_an_offset(peer: Peer) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        work = await player.next_work()
        whole = b"".join([chunk async for chunk in peer.transport.download(work.job_id, 0, 0)])
        rest = b"".join([chunk async for chunk in peer.transport.download(work.job_id, 0, 7)])
        assert rest == whole[7:]


async def test_an_unknown_version_is_not_found(peer: Peer) -> None:
    job_id = await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        await player.next_work()
        with pytest.raises(NotFound, match="version 9"):
            async for _ in peer.transport.download(job_id, 9, 0):
                pass


async def test_an_upload_in_chunks_resumes_where_it_stopped(peer: Peer) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        frame = RAW.encode(np.ones(LAYOUT.num_values, np.float32), np.random.default_rng(0))
        header = player.header(work, frame)
        data = header.to_bytes()
        signature = sign(peer.key, SIGNATURE_CONTEXT, data)
        half = len(frame) // 2
        # A part that ends early, as when a connection breaks: the bytes that came are kept.
        state = await peer.transport.upload(data, signature, frame[:half], 0)
        assert (state.result, state.received_bytes) == (None, half)
        assert (await peer.transport.upload_state(header.update_id)).received_bytes == half
        # A wrong offset changes nothing and names the right one. A sender cut off in mid-chunk may miss the answer.
        try:
            state = await peer.transport.upload(data, signature, frame, 3)
        except Unreachable:
            state = await peer.transport.upload_state(header.update_id)
        assert (state.result, state.received_bytes) == (None, half)
        state = await peer.transport.upload(data, signature, frame, half)
        assert (state.result, state.received_bytes) == (UpdateResult.ACCEPTED, len(frame))
        assert (await peer.transport.upload_state(header.update_id)).result is UpdateResult.ACCEPTED


async def test_the_same_update_sent_twice_gets_the_same_answer_and_counts_once(peer: Peer) -> None:
    job_id = await peer.submit(cohort=1, rounds=2)
    ones_D = np.ones(LAYOUT.num_values, np.float32)
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        work = await player.next_work()
        first = await player.answer(work, ones_D)
        again = await player.answer(work, ones_D)
        assert first == again
        assert first.result is UpdateResult.ACCEPTED
        await player.next_work()
    assert peer.server.federation.version(job_id, 1).num_updates == 1


async def test_a_second_update_for_one_assignment_does_not_count(peer: Peer) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        await player.answer(work)
        state = await player.answer(work, update_id="f" * 32)
        assert state.result in {UpdateResult.DUPLICATE, UpdateResult.TOO_LATE}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": "elsewhere"}, UpdateResult.BAD_SIGNATURE),
        ({"assignment_id": "0" * 32}, UpdateResult.NOT_ASSIGNED),
        ({"job_id": "0" * 32}, UpdateResult.UNKNOWN_JOB),
        ({"version": 7}, UpdateResult.WRONG_VERSION),
        ({"kind": WorkKind.EVALUATE}, UpdateResult.WRONG_VERSION),
        ({"layout_digest": "0" * 64}, UpdateResult.WRONG_LAYOUT),
        ({"frame_bytes": 1 << 40}, UpdateResult.WRONG_SIZE),
        ({"frame_bytes": 3}, UpdateResult.WRONG_SIZE),
        ({"frame_digest": "0" * 64}, UpdateResult.WRONG_DIGEST),
        ({"num_examples": 0}, UpdateResult.OUT_OF_BOUNDS),
    ],
)
async def test_an_update_that_does_not_fit_is_refused_with_the_reason(
    peer: Peer, changes: dict[str, Any], reason: UpdateResult
) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        work = await player.next_work()
        state = await player.answer(work, **changes)
        assert state.result is reason
        assert state.text
        if changes.keys() & {"federation", "assignment_id", "job_id"}:
            return  # nothing that this client was asked for: its work is still wanted
        assert await player.answer(work, **changes) == state, "it had its chance: the answer stays"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), UpdateResult.NOT_FINITE),
        (float("inf"), UpdateResult.NOT_FINITE),
        (1e30, UpdateResult.OUT_OF_BOUNDS),
    ],
)
async def test_a_poisonous_value_is_refused(peer: Peer, value: float, reason: UpdateResult) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        await begin(player)
        bad_D = np.zeros(LAYOUT.num_values, np.float32)
        bad_D[5] = value
        work = await player.next_work()
        state = await player.answer(work, bad_D)
        assert state.result is reason
        assert "value 5" in state.text


async def test_a_client_whose_update_was_refused_is_asked_again_when_nobody_else_comes(peer: Peer) -> None:
    job_id = await peer.submit(deadline_s=1.0)
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        state = await player.answer(work, layout_digest="0" * 64)
        assert state.result is UpdateResult.WRONG_LAYOUT
        again = await player.next_work()
        assert (again.kind, again.job_id) == (WorkKind.INITIALISE, job_id)
        assert again.assignment_id != work.assignment_id


async def test_somebody_elses_signature_is_refused(peer: Peer) -> None:
    await peer.submit()
    async with playing(peer.transport, Ed25519PrivateKey.generate()) as player:
        state = await player.answer(await player.next_work())
        assert state.result is UpdateResult.BAD_SIGNATURE


async def test_an_interrupted_client_gets_its_work_again(peer: Peer) -> None:
    await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        first = await player.next_work()
    async with playing(peer.transport, peer.key) as player:
        assert (await player.next_work()).assignment_id == first.assignment_id


async def test_a_second_session_ends_the_first(peer: Peer) -> None:
    async with playing(peer.transport, peer.key) as first, playing(peer.transport, peer.key):
        with pytest.raises(FedError, match="another session"):
            await first.next_order()


@pytest.mark.parametrize("transient", [False, True])
async def test_declined_work_abandons_a_round_that_cannot_reach_its_quorum(peer: Peer, transient: bool) -> None:
    job_id = await peer.submit(max_retries=0)
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        await player.session.send(Decline(work.assignment_id, "no data here", transient))
        while job_id in peer.server.federation.engines:
            await peer.server.federation.next_change().wait()
    record = peer.server.federation.job(job_id)
    assert record.status == "failed"
    assert "no assigned client is left" in record.failure


async def test_stopping_a_job_cancels_its_work(peer: Peer) -> None:
    job_id = await peer.submit()
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        await peer.server.federation.stop_job(job_id)
        order = await player.next_order()
        assert isinstance(order, Cancel)
        assert order.assignment_id == work.assignment_id
        state = await player.answer(work)
        assert state.result is UpdateResult.TOO_LATE


async def test_a_large_frame_crosses_in_chunks(peer: Peer) -> None:
    """More than two chunks both ways, by the layout that the client itself declares."""
    await peer.submit()
    values = 3 * CHUNK_BYTES // 4
    vector_D = np.linspace(0, 1, values, dtype=np.float32)
    frame = RAW.encode(vector_D, np.random.default_rng(0))
    async with playing(peer.transport, peer.key) as player:
        work = await player.next_work()
        rows = [["adapter", "large", [values], "float32"]]
        digest = Layout.of([("adapter", "large", (values,), "float32")]).digest
        data = player.header(work, frame, layout=rows, layout_digest=digest).to_bytes()
        state = await peer.transport.upload(data, sign(peer.key, SIGNATURE_CONTEXT, data), frame, 0)
        assert state.result is UpdateResult.ACCEPTED
        work = await player.next_work()
        assert isinstance(work, Assignment)
        back = b"".join([chunk async for chunk in peer.transport.download(work.job_id, 0, 0)])
        assert RAW.decode(back, values).tobytes() == vector_D.tobytes()
