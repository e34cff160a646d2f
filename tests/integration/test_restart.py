"""The server or a client ends in the middle of a round, and the round goes on as if nothing had been.

One client is a process; two are played by the test with the real trainer, so that a round stays open for as long as the
test wants and still ends with the bytes of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedclient.guard import Guard
from fedclient.identity import ClientIdentity
from fedclient.ledger import MemoryLedger
from fedclient.residuals import MemoryResiduals
from fedclient.trainer import LocalWorker
from fedclient.transport.grpc_transport import GrpcTransport
from fedclient.updates import Update, UpdateMaker
from fedcore.clock import SystemClock
from fedcore.errors import UpdateResult
from fedcore.jobfile import Job
from fedcore.messages import Assignment, Hello, UploadState, WorkKind
from fedserver.federation import Federation
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.scheduler import Phase
from fedsim.simulation import make_clients, simulate
from fedsim.transport import InProcessTransport
from tests.support.player import Player, playing
from tests.support.processes import Deployment, Process, bytes_of, deployed, digits_job
from tests.support.server import FEDERATION, running_server, small_job

NUM_CLIENTS = 3
PROCESS = "client-1"
HELLO = Hello("test", "test", ("digits",), ("lora",), ("raw",))
JOB = digits_job("disturbed", rounds=2)


class Trainer:
    """Makes the updates that `fedclient run` would make."""

    def __init__(self, identity: ClientIdentity, shard: int) -> None:
        self.identity = identity
        data = {"shard": str(shard), "num_shards": str(NUM_CLIENTS)}
        self._maker = UpdateMaker(
            LocalWorker(data),
            identity.signing_key,
            identity.federation,
            identity.client,
            MemoryResiduals(),
            Guard(MemoryLedger()),
        )

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[Played]:
        transport = GrpcTransport(self.identity, SystemClock())
        try:
            async with playing(transport, self.identity.signing_key, HELLO) as player:
                yield Played(player, transport, self)
        finally:
            await transport.close()

    async def update(self, transport: GrpcTransport, work: Assignment) -> Update:
        if work.kind is WorkKind.INITIALISE:
            return self._maker.initialise(work)
        frame = b"".join([chunk async for chunk in transport.download(work.job_id, work.version, 0)])
        return await asyncio.to_thread(
            self._maker.update, work, memoryview(frame), lambda part: None, threading.Event()
        )


@dataclass
class Played:
    player: Player
    transport: GrpcTransport
    trainer: Trainer

    async def next_work(self) -> Assignment:
        async with asyncio.timeout(30):
            return await self.player.next_work()

    async def update(self, work: Assignment) -> Update:
        return await self.trainer.update(self.transport, work)

    async def send(self, update: Update) -> UploadState:
        return await self.transport.send_update(update.header, update.signature, update.frame[:])

    async def work(self, job_id: str, until: tuple[WorkKind, int]) -> Assignment:
        """Do what is asked until work of this kind and version is, and return that."""
        while True:
            work = await self.next_work()
            assert work.job_id == job_id
            if (work.kind, work.version) == until:
                return work
            assert (await self.send(await self.update(work))).result is UpdateResult.ACCEPTED

    async def rest(self, job_id: str) -> None:
        """Do what is asked, to the job's last evaluation."""
        work = await self.work(job_id, (WorkKind.EVALUATE, JOB.job.rounds))
        assert (await self.send(await self.update(work))).result is UpdateResult.ACCEPTED


@pytest.fixture(scope="module")
def undisturbed() -> list[tuple[object, ...]]:
    return reference(JOB)


def reference(job: Job) -> list[tuple[object, ...]]:
    return bytes_of(asyncio.run(simulate(job, make_clients(job, NUM_CLIENTS, {}))).history)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("restart")) as deployment:
        deployment.start_client(PROCESS, {"shard": 0, "num_shards": NUM_CLIENTS}).wait_for_event("connected")
        yield deployment


@pytest.fixture(scope="module")
def trainers(deployment: Deployment) -> list[Trainer]:
    return [Trainer(deployment.enrol(f"client-{shard + 1}"), shard) for shard in range(1, NUM_CLIENTS)]


def asked(client: Process, job_id: str) -> list[tuple[object, object]]:
    """Return what a client process was asked for, in order."""
    return [(entry["kind"], entry["version"]) for entry in client.events("assignment", job=job_id)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_server_that_ends_within_a_round_goes_on_with_what_it_had_acknowledged(
    deployment: Deployment,
    trainers: list[Trainer],
    undisturbed: list[tuple[object, ...]],
    number: signal.Signals,
) -> None:
    second, third = trainers
    job_id = await asyncio.to_thread(deployment.submit, JOB)
    client = deployment.clients[PROCESS]
    async with second.playing() as two, third.playing() as three:
        works = await asyncio.gather(*(played.work(job_id, (WorkKind.TRAIN, 0)) for played in (two, three)))
        acknowledged, half_sent = [await played.update(work) for played, work in zip((two, three), works, strict=True)]
        assert (await two.send(acknowledged)).result is UpdateResult.ACCEPTED
        half = len(half_sent.frame) // 2
        state = await three.transport.upload(half_sent.header, half_sent.signature, half_sent.frame[:half], 0)
        assert (state.result, state.received_bytes) == (None, half)
        before = await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["accepted"] == 2))
        assert before["waiting_for"] == {"what": "updates", "missing": 1, "clients": ["client-3"]}
        connections = len(client.events("connected"))
        code = await asyncio.to_thread(deployment.server.stop, number)
        assert code == (0 if number is signal.SIGTERM else -number), deployment.server.story()

    await asyncio.to_thread(deployment.start_server)
    after = await asyncio.to_thread(deployment.status, job_id)
    same = ("status", "stage", "phase", "version", "attempt", "accepted", "waiting_for")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    await asyncio.to_thread(client.wait_for_event, "connected", count=connections + 1)

    async with second.playing() as two, third.playing() as three:
        # Whoever never heard the answer asks again: it is the same, and the update counts once.
        assert (await two.send(acknowledged)).result is UpdateResult.ACCEPTED
        assert (await asyncio.to_thread(deployment.status, job_id))["accepted"] == 2
        again = await three.next_work()
        assert again.assignment_id == works[1].assignment_id
        # What had arrived of an upload is still there.
        assert (await three.transport.upload_state(half_sent.update_id)).received_bytes == half
        rest = await three.transport.upload(half_sent.header, half_sent.signature, half_sent.frame, half)
        assert rest.result is UpdateResult.ACCEPTED
        await asyncio.gather(*(played.rest(job_id) for played in (two, three)))
        history = await asyncio.to_thread(deployment.finish, job_id)
    assert bytes_of(history) == undisturbed
    assert sorted(work for work in asked(client, job_id) if work[0] != "initialise") == [
        ("evaluate", 2),
        ("train", 0),
        ("train", 1),
    ], "a client was asked again for what it had delivered"


async def test_a_client_that_is_killed_within_a_round_gets_its_work_again(
    deployment: Deployment, trainers: list[Trainer], undisturbed: list[tuple[object, ...]]
) -> None:
    second, third = trainers
    job_id = await asyncio.to_thread(deployment.submit, JOB)
    first_life = deployment.clients[PROCESS]
    async with second.playing() as two, third.playing() as three:
        works = await asyncio.gather(*(played.work(job_id, (WorkKind.TRAIN, 0)) for played in (two, three)))
        await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["accepted"] == 1))
        first_life.send(signal.SIGSTOP)  # so that it cannot be quicker than the test
        for played, work in zip((two, three), works, strict=True):
            assert (await played.send(await played.update(work))).result is UpdateResult.ACCEPTED
        works = await asyncio.gather(*(played.work(job_id, (WorkKind.TRAIN, 1)) for played in (two, three)))
        for played, work in zip((two, three), works, strict=True):
            assert (await played.send(await played.update(work))).result is UpdateResult.ACCEPTED
        stuck = await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["accepted"] == 2))
        assert [row["client"] for row in stuck["working"]] == [PROCESS]
        await asyncio.to_thread(first_life.kill)
        await asyncio.to_thread(deployment.wait_for, job_id, lambda job: not job["working"][0]["connected"])
        second_life = deployment.start_client(PROCESS, {"shard": 0, "num_shards": NUM_CLIENTS})
        await asyncio.gather(*(played.rest(job_id) for played in (two, three)))
        history = await asyncio.to_thread(deployment.finish, job_id)
    assert bytes_of(history) == undisturbed
    assert asked(second_life, job_id) == [("train", 1), ("evaluate", 2)]


def test_a_server_that_is_killed_again_and_again_computes_the_same(
    deployment: Deployment, undisturbed: list[tuple[object, ...]]
) -> None:
    """Nobody is played here: whatever the kill interrupts, in server or clients, is what it happens to be."""
    for shard in (1, 2):
        client = deployment.start_client(f"client-{shard + 1}", {"shard": shard, "num_shards": NUM_CLIENTS})
        client.wait_for_event("connected")
    job_id = deployment.submit(JOB)
    for event, kind in (("assigned", "initialise"), ("closed", "train"), ("assigned", "evaluate")):
        deployment.server.wait_for_event(event, job=job_id, kind=kind)
        deployment.server.kill()
        deployment.start_server()
    assert bytes_of(deployment.finish(job_id)) == undisturbed


def test_a_server_that_is_killed_between_jobs_keeps_them(deployment: Deployment) -> None:
    with deployment.operator() as server:
        before = server.status()["jobs"]
    deployment.server.kill()
    deployment.start_server()
    with deployment.operator() as server:
        assert server.status()["jobs"] == before
    assert before, "the other tests leave their jobs"


def test_every_blob_of_a_finished_federation_is_whole(deployment: Deployment) -> None:
    """After kills and restarts, what is exported is what the history says."""
    with deployment.operator() as server:
        for job in server.status()["jobs"]:
            for row in server.version(job["job_id"]).history:
                wanted = server.version(job["job_id"], row["version"])
                assert wanted.sha256 == row["sha256"]
                server.read_version(wanted)  # checks the digest


async def test_a_server_lets_nobody_in_before_its_jobs_stand_where_they_stood(tmp_path: Path) -> None:
    """The daemon listens when `recovered` is set. Earlier, an update that is waited for would come too late."""
    async with running_server(tmp_path) as first_life:
        record = await first_life.federation.submit(small_job().to_json())
        identity = await first_life.enrol("alice")
        async with playing(InProcessTransport(first_life.federation, "alice"), identity.signing_key) as player:
            await player.answer(await player.next_work())
            await player.next_work()
        with ThreadPoolExecutor(1) as busy:
            services = replace(first_life.federation.services, fleet=Fleet(), metrics=Metrics(), workers=busy)
            release = threading.Event()
            busy.submit(release.wait)
            second_life = Federation(services, FEDERATION, lambda client: None)
            running = asyncio.create_task(second_life.run())
            try:
                for _ in range(100):
                    await asyncio.sleep(0)
                assert not second_life.recovered.is_set()
            finally:
                release.set()
            await asyncio.wait_for(second_life.recovered.wait(), 10)
            engine = second_life.engines[record.job_id]
            assert (engine.state.stage, engine.state.phase) == (WorkKind.TRAIN, Phase.OPEN)
            assert engine.attempt is not None
            assert engine.attempt.unfinished() == ["alice"]
            running.cancel()
            await asyncio.wait({running})
