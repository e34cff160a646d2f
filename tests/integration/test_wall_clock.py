"""The server's wall clock is wrong: rounds go by another clock, and only certificates go by this one."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import Exit, Unreachable, UpdateResult
from fedcore.messages import WorkKind
from fedserver.security.authority import CLIENT_LIFETIME_S
from tests.support.player import playing
from tests.support.processes import Process, digits_job
from tests.support.server import TestServer, running_server, small_job

DAY_S = 86_400.0


class LeapingClock(SystemClock):
    """The machine's clock, whose wall clock the test sets."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def wall_s(self) -> float:
        return super().wall_s() + self.ahead_s


async def ended(server: TestServer, job_id: str) -> None:
    async with asyncio.timeout(20):
        while job_id in server.federation.engines:
            await server.federation.next_change().wait()


@pytest.mark.parametrize("leap_s", [DAY_S, -60.0, 0.0], ids=["a day ahead", "a minute back", "no leap"])
async def test_a_leap_of_the_wall_clock_in_a_round_closes_and_abandons_nothing(tmp_path: Path, leap_s: float) -> None:
    clock = LeapingClock()
    async with running_server(tmp_path, clock) as server:
        identity = await server.enrol("ann")
        transport = GrpcTransport(identity, SystemClock())
        job = await server.federation.submit(small_job(rounds=2, deadline_s=600.0).to_json())
        async with playing(transport, identity.signing_key) as player:
            kind = None
            while kind is not WorkKind.EVALUATE:
                work = await player.next_work()
                kind = work.kind
                clock.ahead_s = leap_s - clock.ahead_s  # and in the next round back to what it was
                assert (await player.answer(work)).result is UpdateResult.ACCEPTED
            await ended(server, job.job_id)
        await transport.close()
        attempts = server.federation.services.store.attempts(job.job_id)
        assert [row.outcome for row in attempts] == ["closed"] * 4
        assert server.federation.job(job.job_id).status == "finished"


async def test_a_clock_before_a_certificate_keeps_its_holder_out_until_it_is_right(tmp_path: Path) -> None:
    clock = LeapingClock()
    async with running_server(tmp_path, clock) as server:
        identity = await server.enrol("ann")
        transport = GrpcTransport(identity, SystemClock())
        job = await server.federation.submit(small_job(deadline_s=600.0).to_json())
        async with playing(transport, identity.signing_key) as player:
            work = await player.next_work()
            clock.ahead_s = -DAY_S
            with pytest.raises(Unreachable, match="not valid before"):
                await player.answer(work)
        clock.ahead_s = 0.0
        async with playing(transport, identity.signing_key) as player:
            assert (await player.next_work()).assignment_id == work.assignment_id
            while (await player.answer(work)).result is UpdateResult.ACCEPTED and work.kind is not WorkKind.EVALUATE:
                work = await player.next_work()
            await ended(server, job.job_id)
        await transport.close()
        assert server.federation.job(job.job_id).status == "finished"


async def client_process(stack: AsyncExitStack, folder: Path) -> Process:
    data = ("--data", "shard=0", "--data", "num_shards=1")
    process = Process("fedclient", "run", "--folder", folder, "--log-format", "json", *data)
    stack.push_async_callback(asyncio.to_thread, process.discard)
    await asyncio.to_thread(process.wait_for_event, "connected")
    return process


async def test_a_client_process_outlives_a_clock_before_its_certificate_but_no_revocation(tmp_path: Path) -> None:
    clock = LeapingClock()
    async with running_server(tmp_path, clock) as server, AsyncExitStack() as stack:
        await server.enrol("ann")
        process = await client_process(stack, tmp_path / "ann")
        clock.ahead_s = -DAY_S
        job = await server.federation.submit(digits_job("clock", rounds=1, cohort=1).to_json())
        await asyncio.to_thread(process.wait_for_event, "server not reachable", count=3)
        clock.ahead_s = 0.0
        async with asyncio.timeout(60):
            await ended(server, job.job_id)
        assert server.federation.job(job.job_id).status == "finished"

        await server.membership.revoke("ann")
        assert await asyncio.to_thread(process.wait) == Exit.REFUSED, process.story()


async def test_a_client_process_ends_by_a_clock_after_its_certificate_and_may_be_started_again(tmp_path: Path) -> None:
    clock = LeapingClock()
    async with running_server(tmp_path, clock) as server, AsyncExitStack() as stack:
        await server.enrol("ann")
        process = await client_process(stack, tmp_path / "ann")
        clock.ahead_s = CLIENT_LIFETIME_S
        job = await server.federation.submit(digits_job("clock", rounds=1, cohort=1).to_json())
        assert await asyncio.to_thread(process.wait) == Exit.REFUSED, process.story()
        clock.ahead_s = 0.0
        await client_process(stack, tmp_path / "ann")
        async with asyncio.timeout(60):
            await ended(server, job.job_id)
        assert server.federation.job(job.job_id).status == "finished"
