"""An update counts once and in one place: sent twice, late, while the round closes, to another server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclient.transport.grpc_transport import GrpcTransport
from fedcore.clock import SystemClock
from fedcore.errors import Unreachable, UpdateResult
from fedcore.messages import Assignment, UploadState, WorkKind
from tests.support.crew import Member, crew
from tests.support.player import playing
from tests.support.processes import Deployment
from tests.support.server import FEDERATION, running_server, small_job

RACERS = ("ann", "berta", "carla")
ROUNDS = 20
ACCEPTED, TOO_LATE = UpdateResult.ACCEPTED, UpdateResult.TOO_LATE


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("races"), FEDERATION) as deployment:
        deployment.start_server()
        yield deployment


async def test_an_update_that_races_with_the_close_is_in_the_version_or_too_late(deployment: Deployment) -> None:
    """The first update closes the round. Each client's sample count tells whether its update is in the sum."""
    job_id = await asyncio.to_thread(deployment.submit, small_job(cohort=3, quorum=1, buffer=1, rounds=ROUNDS))
    weights = dict(zip(RACERS, (1, 2, 4), strict=True))
    accepted = []
    async with crew(deployment, *RACERS) as members:
        for version in range(ROUNDS):
            works = await asyncio.gather(*(member.work_until(WorkKind.TRAIN, version) for member in members))
            racers = list(zip(members, works, strict=True))
            first, second, third = racers[version % 3 :] + racers[: version % 3]

            async def send(member: Member, work: Assignment) -> UploadState:
                return await member.answer(work, num_examples=weights[member.name])

            async def send_in_chunks(member: Member, work: Assignment) -> UploadState:
                letter = member.signed(member.header(work, num_examples=weights[member.name]))
                while True:
                    try:
                        return await member.transport.upload(*letter, member.frame(work), 0)
                    except Unreachable:
                        pass  # a sender that is cut off in mid-chunk may miss the answer

            states = await asyncio.gather(send(*first), send_in_chunks(*second), send(*third))
            names = [member.name for member, _ in (first, second, third)]
            results = {name: state.result for name, state in zip(names, states, strict=True)}
            assert set(results.values()) <= {ACCEPTED, TOO_LATE}, results
            accepted.append({name for name, result in results.items() if result is ACCEPTED})
            # Whoever asks again hears the same.
            again = await asyncio.gather(*(send(member, work) for member, work in racers))
            assert {member.name: state.result for (member, _), state in zip(racers, again, strict=True)} == results
        await asyncio.gather(*(member.finish() for member in members))
    history = await asyncio.to_thread(deployment.finish, job_id)
    in_version = [(row["num_updates"], row["num_examples"]) for row in history[1:]]
    assert in_version == [(len(names), sum(weights[name] for name in names)) for names in accepted]


async def test_an_update_that_is_replayed_changes_nothing(deployment: Deployment, tmp_path: Path) -> None:
    """In its round, in a later one, by another client, after a restart, and at another server of the same name."""
    job_id = await asyncio.to_thread(deployment.submit, small_job(rounds=2))
    async with crew(deployment, "ann") as (ann,):
        work = await ann.work_until(WorkKind.TRAIN, 0)
        letter = (*ann.signed(ann.header(work)), ann.frame(work))
        for _ in range(3):
            assert (await ann.transport.send_update(*letter)).result is ACCEPTED
        later = await ann.work_until(WorkKind.TRAIN, 1)
        assert (await ann.transport.send_update(*letter)).result is ACCEPTED
        status = await asyncio.to_thread(deployment.status, job_id)
        assert (status["version"], status["accepted"]) == (1, 0)
        async with crew(deployment, "berta") as (berta,):
            assert (await berta.transport.send_update(*letter)).result is UpdateResult.BAD_SIGNATURE
    await asyncio.to_thread(deployment.server.kill)
    await asyncio.to_thread(deployment.start_server)
    async with crew(deployment, "ann") as (ann,):
        assert (await ann.next_work()).assignment_id == later.assignment_id
        assert (await ann.transport.send_update(*letter)).result is ACCEPTED
        assert (await asyncio.to_thread(deployment.status, job_id))["accepted"] == 0
        await ann.finish(later)
    history = await asyncio.to_thread(deployment.finish, job_id)
    assert [row["num_updates"] for row in history] == [1, 1, 1]
    async with running_server(tmp_path) as other:
        identity = await other.enrol("ann")
        transport = GrpcTransport(identity, SystemClock())
        async with playing(transport, identity.signing_key):
            state = await transport.send_update(*letter)
        await transport.close()
        assert state.result is UpdateResult.BAD_SIGNATURE
