"""Blobs that are lost or damaged under a server process: it ends, says which, and goes on once they are mended."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from fedcore.errors import Exit, Unreachable
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedcore.messages import WorkKind
from tests.support.crew import crew
from tests.support.processes import Deployment, Process, bytes_of, run
from tests.support.server import small_job

LARGE = Layout.of([("adapter", "large", (100_000,), "float32")])  # as bf16 too more than fits into the store
NAMES = ("ann", "berta")
COLUMNS = {"state": "state_blob", "frame": "frame_body", "optimiser": "optimizer_blob"}
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "cut": lambda data: data[:-4],
    "longer": lambda data: data + b"more",
    "altered": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


def job() -> Job:
    tree = small_job(cohort=len(NAMES), rounds=2).model_dump(mode="json")
    tree["server_optimizer"] = {"name": "momentum"}
    tree["compression"]["downlink"] = [{"codec": "bf16"}]  # so that the frame is not the state
    return parse_job(tree, "job")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("damaged")) as deployment:
        deployment.start_server()
        yield deployment


async def finish(deployment: Deployment, job_id: str) -> list[tuple[object, ...]]:
    async with crew(deployment, *NAMES, layout=LARGE) as members:
        await asyncio.gather(*(member.finish() for member in members))
    return bytes_of(await asyncio.to_thread(deployment.finish, job_id))


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> list[tuple[object, ...]]:
    return asyncio.run(finish(deployment, deployment.submit(job())))


def rows(deployment: Deployment, sql: str, job_id: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(f"file:{deployment.state / 'store.sqlite'}?mode=ro", uri=True)) as store:
        return store.execute(sql, (job_id,)).fetchall()


def journaled(deployment: Deployment, job_id: str) -> list[list[tuple[str, ...]]]:
    """Return what is recorded of a job, but for what its clients did."""
    return [
        rows(deployment, f"SELECT * FROM {table} WHERE job_id = ?", job_id)
        for table in ("jobs", "versions", "attempts")
    ]


def newest_blob(deployment: Deployment, what: str, job_id: str) -> Path:
    sql = f"SELECT {COLUMNS[what]} FROM versions WHERE job_id = ? ORDER BY version DESC"
    digest = rows(deployment, sql, job_id)[0][0]
    return deployment.state / "blobs" / digest[:2] / digest


def inflict(damage: str, path: Path) -> bytes:
    """Damage a file as no program of ours would, and return what it held."""
    data = path.read_bytes()
    path.unlink()
    if (damaged := DAMAGES[damage](data)) is not None:
        path.write_bytes(damaged)
    return data


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds, without the lock: it names the process that had it last."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def check_ended(server: Process, digest: str) -> None:
    """The server has ended over this blob, said so in one line, and shown no traceback."""
    assert server.wait() == Exit.STATE_UNUSABLE, server.story()
    errors = [json.loads(line)["error"] for line in server.err if line.startswith('{"error"')]
    assert [(error["code"], error["exit_code"]) for error in errors] == [("state-unusable", Exit.STATE_UNUSABLE)]
    assert digest in errors[0]["text"]
    assert "Traceback" not in server.story()


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("state", "gone"),
        ("state", "cut"),
        ("optimiser", "longer"),
        ("frame", "gone"),
        ("frame", "cut"),
    ],
)
async def test_damage_that_a_running_server_meets_ends_it_and_costs_the_job_nothing(
    deployment: Deployment, expected: list[tuple[object, ...]], what: str, damage: str
) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job())
    async with crew(deployment, *NAMES, layout=LARGE) as members:
        works = await asyncio.gather(*(member.work_until(WorkKind.TRAIN, 1) for member in members))
        path = newest_blob(deployment, what, job_id)
        before = journaled(deployment, job_id)
        data = inflict(damage, path)
        with suppress(Unreachable, StopAsyncIteration):  # the server's end may be quicker than its last answer
            if what == "frame":
                await members[0].player.download(works[0])
            for member, work in zip(members, works, strict=True):
                await member.answer(work)
        await asyncio.to_thread(check_ended, deployment.server, path.name)
    assert journaled(deployment, job_id) == before
    path.write_bytes(data)
    await asyncio.to_thread(deployment.start_server)
    assert await finish(deployment, job_id) == expected


async def test_a_server_does_not_start_over_damage_and_starts_when_it_is_mended(
    deployment: Deployment, expected: list[tuple[object, ...]]
) -> None:
    job_id = await asyncio.to_thread(deployment.submit, job())
    async with crew(deployment, *NAMES, layout=LARGE) as members:
        await asyncio.gather(*(member.work_until(WorkKind.TRAIN, 1) for member in members))
    paths = {what: newest_blob(deployment, what, job_id) for what in COLUMNS}  # asked while SQLite's files are open
    assert await asyncio.to_thread(deployment.server.stop) == Exit.OK
    for what, damage in (("state", "gone"), ("frame", "altered"), ("optimiser", "cut")):
        path = paths[what]
        data = inflict(damage, path)
        before = contents(deployment.state)
        server = await asyncio.to_thread(run, "fedserver", "run", "--folder", deployment.state, "--host", "127.0.0.1")
        assert server.wait() == Exit.STATE_UNUSABLE, server.story()
        assert server.out == [], "it serves nobody"
        (line,) = [line for line in server.err if line.startswith("error: ")]
        assert path.name in line
        assert "Traceback" not in server.story()
        assert contents(deployment.state) == before
        path.write_bytes(data)
    await asyncio.to_thread(deployment.start_server)
    assert await finish(deployment, job_id) == expected
