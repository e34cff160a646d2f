"""kill -9 of the server of a private job: what a version shows has been counted, once, and nothing resets it.

Played clients and an unsafe seed, so that every version has the bytes that it has in a server that nobody killed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fedcore.errors import Unreachable
from fedcore.jobfile import Job, parse_job
from fedcore.messages import WorkKind
from fedserver.state.records import ReleaseRecord
from fedserver.state.sqlite import SqliteStore
from tests.support.crew import crew
from tests.support.gate import Gate, open_gate
from tests.support.gated_plugins import environment
from tests.support.player import HELLO
from tests.support.processes import Deployment, Tree, bytes_of, run
from tests.support.server import small_job

NAMES = ("ann", "berta")
ROUNDS = 2
GATED = replace(HELLO, codecs=("raw", "gated"))


def make_job(**sections: object) -> Job:
    job = small_job(cohort=len(NAMES), quorum=len(NAMES), rounds=ROUNDS)
    privacy = {"mechanism": "dp-fedavg", "clip": 40.0, "noise_multiplier": 1.0, "delta": 1e-3, "unsafe_seed": 6}
    private = {"aggregator": {"max_examples": 1}, "privacy": privacy}
    return parse_job(job.model_dump(mode="json") | private | sections, "job")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    plugins = environment(tmp_path_factory.mktemp("site"))
    with Deployment(tmp_path_factory.mktemp("private"), environment=plugins) as deployment:
        deployment.start_server()
        yield deployment


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with open_gate() as gate:
        yield gate


def has_version(number: int) -> Callable[[Tree], bool]:
    return lambda job: bool(job["version"] == number)


def journaled(deployment: Deployment, job_id: str) -> tuple[list[ReleaseRecord], int | None]:
    """Return what a dead server has left: releases, and its newest version."""
    store = SqliteStore(deployment.state / "store.sqlite")
    try:
        latest = store.latest_version(job_id)
        return store.releases(job_id), None if latest is None else latest.version
    finally:
        store.close()


async def test_killed_between_the_noise_and_the_version(deployment: Deployment, gate: Gate) -> None:
    """When the new vector is written, its noise drawn, and neither encoded nor recorded."""
    undisturbed = await asyncio.to_thread(deployment.submit, make_job())
    async with crew(deployment, *NAMES) as members:
        await asyncio.gather(*(member.finish() for member in members))
    expected: list[Tree] = await asyncio.to_thread(deployment.finish, undisturbed)
    assert len({row["epsilon"] for row in expected}) == ROUNDS + 1

    gated = {"downlink": [{"codec": "gated", "gate": gate.port}]}
    job_id = await asyncio.to_thread(deployment.submit, make_job(compression=gated))
    for number in range(ROUNDS + 1):
        async with crew(deployment, *NAMES, hello=GATED) as members:
            working = [asyncio.create_task(member.finish()) for member in members]
            await asyncio.to_thread(gate.wait_for_client)
            await asyncio.to_thread(deployment.wait_for, job_id, lambda job: bool(job["phase"] == "closing"))
            await asyncio.to_thread(deployment.server.kill)
            ends = await asyncio.gather(*working, return_exceptions=True)
            assert all(isinstance(end, Unreachable) for end in ends), ends
        releases, latest = await asyncio.to_thread(journaled, deployment, job_id)
        assert latest == (number - 1 if number else None)
        assert [row.version for row in releases] == list(range(number))  # one more than there are versions to show it
        assert all(json.loads(row.clients) == list(NAMES) for row in releases)
        starting = asyncio.create_task(asyncio.to_thread(deployment.start_server))
        held = await asyncio.to_thread(gate.wait_for_client)
        held.release()
        await starting
        reached = await asyncio.to_thread(deployment.wait_for, job_id, has_version(number))
        # The interrupted attempt is the same attempt: it counts once.
        assert reached["privacy"]["epsilon"] == expected[number]["epsilon"]
    async with crew(deployment, *NAMES, hello=GATED) as members:
        await asyncio.gather(*(member.finish() for member in members))
    history = await asyncio.to_thread(deployment.finish, job_id)
    assert bytes_of(history) == bytes_of(expected)
    assert [row["epsilon"] for row in history] == [row["epsilon"] for row in expected]


async def test_a_restart_resets_nothing(deployment: Deployment) -> None:
    job_id = await asyncio.to_thread(deployment.submit, make_job())
    async with crew(deployment, *NAMES) as members:
        await asyncio.gather(*(member.work_until(WorkKind.TRAIN, 1) for member in members))
    before = (await asyncio.to_thread(deployment.status, job_id))["privacy"]
    assert 0 < before["epsilon"] < before["epsilon_at_end"]
    await asyncio.to_thread(deployment.server.kill)
    await asyncio.to_thread(deployment.start_server)
    assert (await asyncio.to_thread(deployment.status, job_id))["privacy"] == before
    async with crew(deployment, *NAMES) as members:
        await asyncio.gather(*(member.finish() for member in members))
    await asyncio.to_thread(deployment.finish, job_id)
    after = (await asyncio.to_thread(deployment.status, job_id))["privacy"]
    assert after["epsilon"] == after["epsilon_at_end"] == before["epsilon_at_end"]
    assert 'of="now"} +Inf' in await asyncio.to_thread(deployment.metrics), "the seed is known"
    shown = await asyncio.to_thread(run, "fedserver", "privacy", job_id, "--folder", deployment.state, "--json")
    assert json.loads(shown.out[0])["guarantee"] == after["guarantee"]
    out = deployment.folder / "exported"
    await asyncio.to_thread(run, "fedserver", "export", job_id, "--folder", deployment.state, "--out", out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Privacy" in card
    assert "**No privacy guarantee.** All draws followed from the seed 6" in card
