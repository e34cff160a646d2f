"""A server whose files cannot grow any more says so in one line, ends, and goes on from there when there is room."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.errors import Exit, Unreachable, UpdateResult
from fedcore.layout import Layout
from fedcore.messages import WorkKind
from tests.support.crew import Member, crew
from tests.support.player import LAYOUT
from tests.support.processes import Deployment, Process, bytes_of
from tests.support.server import small_job

LARGE = Layout.of([("adapter", "large", (100_000,), "float32")])


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path) as deployment:
        deployment.start_server("sh", "-c", 'ulimit -f 512; exec "$@"', "sh")
        yield deployment


async def work_on(member: Member, accepted: list[int]) -> None:
    """Work until the job or the server ends."""
    kind = None
    while kind is not WorkKind.EVALUATE:
        work = await member.next_work()
        assert (await member.answer(work)).result is UpdateResult.ACCEPTED
        accepted.append(work.version)
        kind = work.kind


@pytest.mark.parametrize(
    ("layout", "rounds"), [(LAYOUT, 100), (LARGE, 2)], ids=["the journal does not fit", "a frame does not fit"]
)
async def test_a_full_disk_ends_the_server_with_one_clear_line_and_costs_nothing(
    deployment: Deployment, layout: Layout, rounds: int
) -> None:
    job = small_job(rounds=rounds)
    job_id = await asyncio.to_thread(deployment.submit, job)
    accepted: list[int] = []
    with pytest.raises((Unreachable, StopAsyncIteration)):  # cut off, or sent away in good order
        async with crew(deployment, "ann", layout=layout) as (ann,):
            await work_on(ann, accepted)
    assert await asyncio.to_thread(deployment.server.wait) == Exit.STORAGE_FAILED
    check_said(deployment.server)

    await asyncio.to_thread(deployment.start_server)
    async with crew(deployment, "ann", layout=layout) as (ann,):
        await work_on(ann, accepted)
        history = await asyncio.to_thread(deployment.finish, job_id)
        undisturbed = await asyncio.to_thread(deployment.submit, job)
        await ann.finish()
        assert bytes_of(history) == bytes_of(await asyncio.to_thread(deployment.finish, undisturbed))
    assert len(accepted) == rounds + 2, "asked again for what had been acknowledged"


def check_said(server: Process) -> None:
    errors = [json.loads(line)["error"] for line in server.err if line.startswith('{"error"')]
    assert [(error["code"], error["exit_code"]) for error in errors] == [("storage-failed", Exit.STORAGE_FAILED)]
    assert re.search("File too large|disk I/O error|disk is full", errors[0]["text"])
    assert "Traceback" not in server.story()
    assert len(server.out) == 1, "nothing after the line that says where it serves"
