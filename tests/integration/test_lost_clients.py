"""A client process is killed while it trains: the round goes on without it, or is tried again, for everybody to see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pytest

from fedcore.adapters import FULL_GROUP
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedcore.messages import Assignment, WorkKind
from tests.support.crew import Member, crew
from tests.support.gate import TASK_FILE, Gate, open_gate
from tests.support.player import HELLO
from tests.support.processes import Deployment, Process, Tree, deployed

LOST = "client"
NAMES = ("ann", "berta")
GATED = replace(HELLO, tasks=("gated",))
DEADLINE_S = 3.0
# Of the process's task, so that whoever makes version 0, it is the same.
LAYOUT = Layout.of([(FULL_GROUP, "weight", (2, 2), "float32"), (FULL_GROUP, "bias", (2,), "float32")])


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("lost")) as deployment:
        start_client(deployment, gate)
        yield deployment


def start_client(deployment: Deployment, gate: Gate) -> Process:
    client = deployment.start_client(LOST, {"gate": gate.port}, [TASK_FILE])
    client.wait_for_event("connected")
    return client


def job_of(quorum: int) -> Job:
    schedule = {"cohort": 3, "quorum": quorum, "deadline_s": DEADLINE_S, "max_retries": 1000}
    return parse_job(
        {"job": {"name": f"quorum-{quorum}", "rounds": 1000}, "task": {"name": "gated"}, "schedule": schedule}, "job"
    )


async def serve(member: Member, work: Assignment | None = None) -> None:
    """Do `work`, and then whatever is asked."""
    while True:
        work = work or await member.player.next_work()
        await member.answer(work)
        work = None


@dataclass
class Scene:
    """A job whose first round lacks one update only, of a client process that is dead."""

    deployment: Deployment
    job_id: str
    assigned: Tree

    async def event(self, name: str, **fields: Any) -> Tree:
        return await asyncio.to_thread(
            self.deployment.server.wait_for_event, name, job=self.job_id, kind="train", **fields
        )


@asynccontextmanager
async def lost(deployment: Deployment, gate: Gate, quorum: int) -> AsyncIterator[Scene]:
    async with crew(deployment, *NAMES, hello=GATED, layout=LAYOUT) as members:
        job_id = await asyncio.to_thread(deployment.submit, job_of(quorum))
        works = await asyncio.gather(*(member.work_until(WorkKind.TRAIN, 0) for member in members))
        await asyncio.to_thread(gate.wait_for_client)
        await asyncio.to_thread(deployment.clients[LOST].kill)
        serving = [asyncio.create_task(serve(*pair)) for pair in zip(members, works, strict=True)]
        try:
            await asyncio.to_thread(deployment.wait_for, job_id, only_the_lost_one_is_missing)
            assigned = deployment.server.wait_for_event("assigned", job=job_id, kind="train")
            assert assigned["clients"] == len(NAMES) + 1
            yield Scene(deployment, job_id, assigned)
            with deployment.operator() as server:
                server.stop(job_id)
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)


def only_the_lost_one_is_missing(job: Tree) -> bool:
    working = [(row["client"], row["connected"]) for row in job["working"]]
    return working == [(LOST, False)] and (job["accepted"], job["version"]) == (len(NAMES), 0)


def seconds_between(first: Tree, second: Tree) -> float:
    return (datetime.fromisoformat(second["ts"]) - datetime.fromisoformat(first["ts"])).total_seconds()


async def test_a_round_closes_at_its_deadline_without_the_client_that_was_killed(
    deployment: Deployment, gate: Gate
) -> None:
    async with lost(deployment, gate, quorum=2) as scene:
        closed = await scene.event("closed")
        assert (closed["version"], closed["updates"]) == (0, 2)
        assert seconds_between(scene.assigned, closed) > DEADLINE_S - 0.5
        with gate.opened():
            await asyncio.to_thread(start_client, deployment, gate)
            await scene.event("closed", updates=3)  # it takes part again
        assert not deployment.server.events("abandoned", job=scene.job_id, kind="train")


async def test_a_round_below_its_quorum_is_abandoned_and_tried_again(deployment: Deployment, gate: Gate) -> None:
    async with lost(deployment, gate, quorum=3) as scene:
        abandoned = await scene.event("abandoned")
        assert abandoned["reason"] == "deadline passed: 2 updates accepted, quorum is 3"
        assert (abandoned["version"], abandoned["attempt"]) == (0, 0)
        status = await asyncio.to_thread(deployment.status, scene.job_id)
        assert (status["status"], status["version"], status["accepted"]) == ("running", 0, 0)
        assert status["attempt"] >= 1
        assert counted(deployment, scene.job_id, "abandoned") >= 1
        with gate.opened():
            await asyncio.to_thread(start_client, deployment, gate)
            closed = await scene.event("closed")
        assert (closed["version"], closed["updates"]) == (0, 3)
        assert closed["attempt"] >= 1
    assert counted(deployment, scene.job_id, "closed") >= 2  # version 0, and the round that was tried again
    assert {row["num_updates"] for row in deployment.history(scene.job_id)[1:]} == {3}


def counted(deployment: Deployment, job_id: str, outcome: str) -> float:
    """Return a value of `roundtable_rounds_total`."""
    series = f'roundtable_rounds_total{{job="{job_id}",outcome="{outcome}"}} '
    (line,) = [line for line in deployment.metrics().splitlines() if line.startswith(series)]
    return float(line.removeprefix(series))
