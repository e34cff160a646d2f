"""kill -9 while a job starts from its clients' gradients, and of clients that have its basis and that do not yet.

Afterwards every version has the bytes that it has where nobody was killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fedcore.errors import Unreachable, UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.layout import BASIS_GROUP, Layout
from fedcore.messages import WorkKind
from tests.integration.test_killed_in_every_phase import everybodys, has_version, kill_and_restart, the_same_again
from tests.support.crew import crew
from tests.support.gate import Gate, Held, open_gate
from tests.support.gated_plugins import environment
from tests.support.player import HELLO
from tests.support.processes import Deployment, Tree, bytes_of

NAMES = ("ann", "berta")
ROUNDS = 3
RANK = 4
SIDES = {"first": (300, 200), "second": (12, 10)}  # one basis in a blob of its own, one gradient too
LAYOUT = Layout.of(
    [
        *(("adapter", f"{name}.lora_R.weight", (RANK, RANK), "float32") for name in SIDES),
        *(
            (BASIS_GROUP, f"{name}.lora_{factor}.weight", shape, "float32")
            for name, (m, n) in SIDES.items()
            for factor, shape in (("A", (RANK, n)), ("B", (m, RANK)))
        ),
    ]
)
PLAYED = replace(HELLO, adapters=("lora-sb",), codecs=("raw", "gated"))
ACCEPTED = UpdateResult.ACCEPTED
TASK_FILE = Path(__file__).parents[1] / "support" / "gated_layers_task.py"


def job_with(task: str = "played", rank: int = RANK, **sections: object) -> Job:
    tree: dict[str, object] = {
        "job": {"name": "start", "rounds": ROUNDS, "seed": 3},
        "task": {"name": task},
        "adapter": {"name": "lora-sb", "rank": rank},
        "schedule": {"cohort": len(NAMES), "quorum": len(NAMES), "deadline_s": 60.0},
    }
    return parse_job(tree | sections, "job")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    plugins = environment(tmp_path_factory.mktemp("site"))
    with Deployment(tmp_path_factory.mktemp("start"), environment=plugins) as deployment:
        deployment.start_server()
        yield deployment


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


Result = tuple[list[tuple[object, ...]], str | None]


def result(deployment: Deployment, job_id: str) -> Result:
    """Return what a job has made once it has finished: its versions and its basis."""
    history: list[Tree] = deployment.finish(job_id)
    with deployment.operator() as server:
        wanted = server.version(job_id)
        server.read_version(wanted)  # compares the digests of both parts
        return bytes_of(history), wanted.basis_sha256


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> Result:
    async def undisturbed() -> Result:
        job_id = await asyncio.to_thread(deployment.submit, job_with())
        async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
            await asyncio.gather(*(member.finish() for member in members))
        return await asyncio.to_thread(result, deployment, job_id)

    found = asyncio.run(undisturbed())
    assert found[1] is not None
    return found


async def test_killed_when_clients_are_asked_for_gradients(deployment: Deployment, expected: Result) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job_with())
    async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
        works = await everybodys(members, WorkKind.GRADIENT, 0)
        await asyncio.to_thread(kill_and_restart, deployment)
    async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
        await the_same_again(members, works)
        await asyncio.gather(*(member.finish(work) for member, work in zip(members, works, strict=True)))
    assert await asyncio.to_thread(result, deployment, job_id) == expected


async def test_killed_when_some_gradients_are_acknowledged(deployment: Deployment, expected: Result) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job_with())
    async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
        works = await everybodys(members, WorkKind.GRADIENT, 0)
        assert (await members[0].answer(works[0])).result is ACCEPTED
        await asyncio.to_thread(kill_and_restart, deployment)
    async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
        assert (await members[0].answer(works[0])).result is ACCEPTED  # the same answer, and counted once
        status = await asyncio.to_thread(deployment.status, job_id)
        assert (status["stage"], status["accepted"]) == ("gradient", 1)
        await asyncio.gather(members[0].finish(), members[1].finish())
    assert await asyncio.to_thread(result, deployment, job_id) == expected


async def test_killed_in_the_closing_of_the_start_and_of_the_round_after_it(
    deployment: Deployment, expected: Result, gate: Gate
) -> None:
    """When values and basis are written, but not yet encoded, nor recorded."""
    job = job_with(compression={"downlink": [{"codec": "gated", "gate": gate.port}]})
    job_id = await asyncio.to_thread(deployment.submit, job)
    for number in range(ROUNDS + 1):
        async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
            working = [asyncio.create_task(member.finish()) for member in members]
            await asyncio.to_thread(gate.wait_for_client)
            await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["phase"] == "closing"))
            await asyncio.to_thread(deployment.server.kill)
            ends = await asyncio.gather(*working, return_exceptions=True)
            assert all(isinstance(end, Unreachable) for end in ends), ends
        starting = asyncio.create_task(asyncio.to_thread(deployment.start_server))
        # Nobody is connected, and nobody needs to be: what was acknowledged is enough.
        (await asyncio.to_thread(gate.wait_for_client)).release()
        await starting
        await asyncio.to_thread(deployment.wait_for, job_id, has_version(number))
    async with crew(deployment, *NAMES, hello=PLAYED, layout=LAYOUT) as members:
        await asyncio.gather(*(member.finish() for member in members))
    assert await asyncio.to_thread(result, deployment, job_id) == expected


# -- client processes ------------------------------------------------------------------------------------------------


def start_client(deployment: Deployment, name: str, gate: Gate) -> None:
    data = {"gate": gate.port, "points": NAMES.index(name)}
    deployment.start_client(name, data, [TASK_FILE]).wait_for_event("connected")


def let_go(held: list[Held]) -> None:
    for each in held:
        with suppress(OSError):  # of a client that is dead
            each.release()


def test_clients_killed_before_and_after_they_have_the_basis(deployment: Deployment, gate: Gate) -> None:
    for name in NAMES:
        start_client(deployment, name, gate)
    with gate.opened():
        expected = result(deployment, deployment.submit(job_with("gated-layers")))
    job_id = deployment.submit(job_with("gated-layers"))
    for name in NAMES:  # the first while it computes its gradient, the second in its first training
        held = [gate.wait_for_client() for _ in NAMES]
        deployment.clients[name].kill()
        start_client(deployment, name, gate)
        held.append(gate.wait_for_client())
        stage = deployment.status(job_id)["stage"]
        assert stage == ("gradient" if name == NAMES[0] else "train")
        let_go(held)
    with gate.opened():
        assert result(deployment, job_id) == expected
    for name in NAMES:
        deployment.clients[name].kill()
