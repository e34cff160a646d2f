"""kill -9 of the server in each phase of a round, and before any of its durable system calls.

The clients are played, so that a phase lasts for as long as the test wants. Afterwards the job has gone on by itself,
each acknowledged update counts once, and every version has the bytes that it has in a server that nobody killed.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedclient.transport.channel import secure_channel
from fedcore.errors import Unreachable, UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.messages import Assignment, WorkKind
from fedproto.v1 import client_pb2, client_pb2_grpc
from fedserver.state.records import Record
from fedsim.transport import InProcessTransport
from tests.support.crew import Member, crew
from tests.support.gate import Gate, open_gate
from tests.support.gated_plugins import environment
from tests.support.player import HELLO, playing
from tests.support.processes import Deployment, Tree, bytes_of
from tests.support.server import running_server, small_job

NAMES = ("ann", "berta")
ROUNDS = 2
GATED = replace(HELLO, codecs=("raw", "gated"))
ACCEPTED = UpdateResult.ACCEPTED

Bytes = list[tuple[object, ...]]


def job_with(rounds: int = ROUNDS, **sections: object) -> Job:
    job = small_job(cohort=len(NAMES), quorum=len(NAMES), rounds=rounds)
    return parse_job(job.model_dump(mode="json") | sections, "job")


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, plugins: dict[str, str]) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("phases"), environment=plugins) as deployment:
        deployment.start_server()
        yield deployment


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


async def undisturbed(deployment: Deployment, rounds: int = ROUNDS) -> Bytes:
    job_id = await asyncio.to_thread(deployment.submit, job_with(rounds))
    async with crew(deployment, *NAMES) as members:
        await asyncio.gather(*(member.finish() for member in members))
    return bytes_of(await asyncio.to_thread(deployment.finish, job_id))


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> Bytes:
    return asyncio.run(undisturbed(deployment))


def kill_and_restart(deployment: Deployment) -> None:
    deployment.server.kill()
    deployment.start_server()


def has_version(number: int) -> Callable[[Tree], bool]:
    return lambda job: bool(job["version"] == number)


async def everybodys(members: Sequence[Member], kind: WorkKind, version: int) -> list[Assignment]:
    return await asyncio.gather(*(member.work_until(kind, version) for member in members))


async def the_same_again(members: Sequence[Member], works: Sequence[Assignment]) -> None:
    """Everybody is given what they had, and not work of another attempt."""
    for member, work in zip(members, works, strict=True):
        assert (await member.next_work()).assignment_id == work.assignment_id


@pytest.mark.parametrize("stage", [(WorkKind.TRAIN, 1), (WorkKind.EVALUATE, ROUNDS)], ids=lambda stage: str(stage[0]))
async def test_killed_when_clients_have_their_work(
    deployment: Deployment, expected: Bytes, stage: tuple[WorkKind, int]
) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job_with())
    async with crew(deployment, *NAMES) as members:
        works = await everybodys(members, *stage)
        await asyncio.to_thread(kill_and_restart, deployment)
    async with crew(deployment, *NAMES) as members:
        await the_same_again(members, works)
        await asyncio.gather(*(member.finish(work) for member, work in zip(members, works, strict=True)))
    assert bytes_of(await asyncio.to_thread(deployment.finish, job_id)) == expected


async def test_killed_in_the_middle_of_an_upload(deployment: Deployment, expected: Bytes) -> None:
    """The stream is open, and its second chunk never comes."""
    job_id = await asyncio.to_thread(deployment.submit, job_with())
    async with crew(deployment, *NAMES) as members:
        ann = members[0]
        works = await everybodys(members, WorkKind.TRAIN, 1)
        header, frame = ann.header(works[0]), ann.frame(works[0])
        data, signature = ann.signed(header)
        half = len(frame) // 2
        channel = secure_channel(
            ann.identity.server, ann.identity.ca_pem, ann.identity.certificate_pem, ann.identity.key_pem
        )
        upload = client_pb2_grpc.ClientServiceStub(channel).Upload(timeout=30)  # type: ignore[call-arg]
        opening = client_pb2.UploadOpening(header=data, signature=signature, offset=0)
        await upload.write(client_pb2.UploadRequest(opening=opening))
        await upload.write(client_pb2.UploadRequest(chunk=client_pb2.Chunk(offset=0, data=frame[:half])))
        while (await ann.transport.upload_state(header.update_id)).received_bytes < half:
            pass
        await asyncio.to_thread(kill_and_restart, deployment)
        await channel.close(None)
    async with crew(deployment, *NAMES) as members:
        ann, berta = members
        await the_same_again(members, works)
        assert (await ann.transport.upload_state(header.update_id)).received_bytes == half
        assert (await ann.transport.upload(data, signature, frame, half)).result is ACCEPTED
        await asyncio.gather(ann.finish(), berta.finish(works[1]))
    assert bytes_of(await asyncio.to_thread(deployment.finish, job_id)) == expected


async def test_killed_when_some_are_acknowledged(deployment: Deployment, expected: Bytes) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job_with())
    async with crew(deployment, *NAMES) as members:
        works = await everybodys(members, WorkKind.TRAIN, 1)
        assert (await members[0].answer(works[0])).result is ACCEPTED
        await asyncio.to_thread(kill_and_restart, deployment)
    async with crew(deployment, *NAMES) as members:
        assert (await members[0].answer(works[0])).result is ACCEPTED  # the same answer, and counted once
        assert (await asyncio.to_thread(deployment.status, job_id))["accepted"] == 1
        await asyncio.gather(members[0].finish(), members[1].finish())
    assert bytes_of(await asyncio.to_thread(deployment.finish, job_id)) == expected


@pytest.mark.parametrize("plugin", ["server optimiser", "codec"])
async def test_killed_in_the_closing_of_every_version(
    deployment: Deployment, expected: Bytes, gate: Gate, plugin: str
) -> None:
    """While the step is computed; and when the new vector is written, but not yet encoded, nor recorded."""
    if plugin == "codec":
        job = job_with(compression={"downlink": [{"codec": "gated", "gate": gate.port}]})
        closings = range(ROUNDS + 1)
    else:
        job = job_with(server_optimizer={"name": "gated", "gate": gate.port})
        closings = range(1, ROUNDS + 1)  # version 0 has no step
    job_id = await asyncio.to_thread(deployment.submit, job)
    for number in closings:
        async with crew(deployment, *NAMES, hello=GATED) as members:
            working = [asyncio.create_task(member.finish()) for member in members]
            await asyncio.to_thread(gate.wait_for_client)
            before = await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["phase"] == "closing"))
            assert before["version"] == (number - 1 if number else None)
            await asyncio.to_thread(deployment.server.kill)
            ends = await asyncio.gather(*working, return_exceptions=True)
            assert all(isinstance(end, Unreachable) for end in ends), ends
        starting = asyncio.create_task(asyncio.to_thread(deployment.start_server))
        # Nobody is connected, and nobody needs to be: what was acknowledged is enough.
        (await asyncio.to_thread(gate.wait_for_client)).release()
        await starting
        await asyncio.to_thread(deployment.wait_for, job_id, has_version(number))
    async with crew(deployment, *NAMES, hello=GATED) as members:
        await asyncio.gather(*(member.finish() for member in members))
    assert bytes_of(await asyncio.to_thread(deployment.finish, job_id)) == expected


# -- before its durable system calls ---------------------------------------------------------------------------------

MORE_ROUNDS = 6
# Attached to the server once it serves; what it says of that goes to standard output.
STRACE = "exec strace -f -o /dev/null -p {pid} -e inject=fsync,fdatasync,/^rename:signal=KILL:when={number} 2>&1"


async def work_on(deployment: Deployment, job_id: str, member: Member, done: list[tuple[str, WorkKind, int]]) -> None:
    """Work until the job or the server ends, and note what is acknowledged."""
    kind = None
    while kind is not WorkKind.EVALUATE:
        waiting = asyncio.create_task(member.next_work())
        while not (await asyncio.wait({waiting}, timeout=1))[0]:
            # Nobody is asked any more if the last evaluations were durable when the server died, but not acknowledged.
            if (await asyncio.to_thread(deployment.status, job_id))["status"] == "finished":
                waiting.cancel()
                return
        work = await waiting
        assert (await member.answer(work)).result is ACCEPTED
        kind = work.kind
        done.append((member.name, kind, work.version))


async def live(deployment: Deployment, job_id: str, done: list[tuple[str, WorkKind, int]]) -> bool:
    """Work for as long as the server lives, and say whether the job is done."""
    try:
        async with crew(deployment, *NAMES) as members:
            working = (work_on(deployment, job_id, member, done) for member in members)
            ends = await asyncio.gather(*working, return_exceptions=True)
    except Unreachable as error:  # dead before everybody was connected
        ends = [error]
    assert all(end is None or isinstance(end, Unreachable) for end in ends), ends
    return ends == [None, None]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs the Debian package strace")
async def test_killed_again_and_again_before_a_durable_system_call(deployment: Deployment) -> None:
    """Before the first of a life, in the next life before the second, and so on; each thread counts its own."""
    expected = await undisturbed(deployment, MORE_ROUNDS)
    job_id = await asyncio.to_thread(deployment.submit, job_with(MORE_ROUNDS))
    done: list[tuple[str, WorkKind, int]] = []
    for number in itertools.count(1):
        tracer = deployment.start("sh", "-c", STRACE.format(pid=deployment.server.pid, number=number))
        await asyncio.to_thread(tracer.wait_for_line, "attached")
        is_done = await live(deployment, job_id, done)
        if not is_done:
            assert await asyncio.to_thread(deployment.server.wait) == -signal.SIGKILL
        await asyncio.to_thread(kill_and_restart, deployment)
        if is_done:
            break
    assert number > 4, "hardly a crash"
    assert len(set(done)) == len(done), "asked again for what had been acknowledged"
    async with asyncio.timeout(30):  # which is less than the job's own deadline: it waits for nobody
        assert bytes_of(await asyncio.to_thread(deployment.finish, job_id)) == expected


async def test_killed_between_the_last_evaluation_and_the_end_of_the_job(tmp_path: Path) -> None:
    """Two records, one after the other. The job needs nobody any more."""
    async with running_server(tmp_path / "first") as first_life:
        job = await first_life.federation.submit(small_job().to_json())
        identity = await first_life.enrol("ann")
        transport = InProcessTransport(first_life.federation, "ann")
        async with playing(transport, identity.signing_key) as player:
            kind = None
            while kind is not WorkKind.EVALUATE:
                work = await player.next_work()
                kind = work.kind
                await player.answer(work)
            while job.job_id in first_life.federation.engines:
                await first_life.federation.next_change().wait()
        store = first_life.federation.services.store
        versions = store.versions(job.job_id)
        blobs = [store.blob(digest) for digest in {row.state_blob for row in versions}]
        found: list[Record] = [
            job,  # as it was when it ran
            *versions,
            *store.attempts(job.job_id),
            *(blob for blob in blobs if blob is not None),
        ]
    async with running_server(tmp_path / "second", found=found) as second_life:
        async with asyncio.timeout(10):
            while job.job_id in second_life.federation.engines:
                await second_life.federation.next_change().wait()
        assert second_life.federation.job(job.job_id).status == "finished"
        assert second_life.federation.services.store.attempts(job.job_id) == store.attempts(job.job_id)
