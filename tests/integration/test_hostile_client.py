"""An enrolled client that plays foul: every trick is refused by name, counted and logged, and the model is the others'.

One job runs through all of it, a trick a round, on a server of its own process.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from fedclient.transport.channel import secure_channel
from fedcore.errors import UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedcore.messages import CHUNK_BYTES, Assignment, Decline, UploadState, WorkKind
from fedproto.v1 import client_pb2, client_pb2_grpc
from tests.support.crew import NO_DRAWS, Member, crew
from tests.support.player import LAYOUT, RAW
from tests.support.processes import Deployment, Tree, deployed
from tests.support.server import small_job

NO_HEADER = b"[" * 1000
HONEST = ("ann", "berta")
FOUL = "mallory"
Result = UpdateResult
Letter = tuple[bytes, bytes, bytes]  # header, signature, frame


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("hostile")) as deployment:
        yield deployment


@dataclass
class Scene:
    """What there is to abuse in a round.

    Attributes:
        work: asked of the foul client.
        earlier: the same, of a round that has closed.
        others: asked of an honest one, now.
        letter: that an honest one has sent in an earlier round.
        letter_id: of that update.
        other_job: one that waits for clients.
    """

    foul: Member
    work: Assignment
    earlier: Assignment
    others: Assignment
    letter: Letter
    letter_id: str
    other_job: str

    async def send(self, frame: bytes | None = None, **changes: Any) -> UploadState:
        """Send another frame than announced, or another header than asked for."""
        header = self.foul.header(self.work, **changes)
        return await self.foul.transport.send_update(
            *self.foul.signed(header), self.foul.frame(self.work) if frame is None else frame
        )

    async def values(self, values_D: np.ndarray[Any, np.dtype[np.float32]]) -> UploadState:
        """Send these values, well wrapped."""
        frame = RAW.encode(values_D, NO_DRAWS)
        header = self.foul.player.header(self.work, frame)
        return await self.foul.transport.send_update(*self.foul.signed(header), frame)

    async def poison(self, value: float) -> UploadState:
        values_D = np.zeros(LAYOUT.num_values, np.float32)
        values_D[3] = value
        return await self.values(values_D)


def zeros(more: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(LAYOUT.num_values + more, np.float32)


@dataclass(frozen=True)
class Trick:
    name: str
    result: UpdateResult
    play: Callable[[Scene], Awaitable[UploadState]]
    is_final: bool = True
    """Whether it was an answer to the work: then the client has had its chance."""
    job: str = "this"
    """The job that it is counted for: this one, the other one, or none."""


def early(name: str, result: UpdateResult, play: Callable[[Scene], Awaitable[UploadState]], job: str = "this") -> Trick:
    """Return a trick that is refused before any of its bytes are looked at, and leaves the work as it was."""
    return Trick(name, result, play, is_final=False, job=job)


TRICKS = [
    Trick("NaN", Result.NOT_FINITE, lambda scene: scene.poison(float("nan"))),
    Trick("infinity", Result.NOT_FINITE, lambda scene: scene.poison(float("-inf"))),
    Trick("huge value", Result.OUT_OF_BOUNDS, lambda scene: scene.poison(3e38)),
    Trick("fewer values", Result.MALFORMED, lambda scene: scene.values(zeros(-1))),
    Trick("more values", Result.WRONG_SIZE, lambda scene: scene.values(zeros(1))),
    Trick("another layout", Result.WRONG_LAYOUT, lambda scene: scene.send(layout_digest="0" * 64)),
    Trick("another digest", Result.WRONG_DIGEST, lambda scene: scene.send(frame_digest="0" * 64)),
    Trick("ten times the bytes", Result.WRONG_SIZE, lambda scene: scene.send(10 * scene.foul.frame(scene.work))),
    Trick("part of the bytes", Result.WRONG_SIZE, lambda scene: scene.send(scene.foul.frame(scene.work)[:-1])),
    Trick("ten times announced", Result.WRONG_SIZE, lambda scene: scene.send(frame_bytes=10_000)),
    Trick("no examples", Result.OUT_OF_BOUNDS, lambda scene: scene.send(num_examples=0)),
    Trick("future version", Result.WRONG_VERSION, lambda scene: scene.send(version=scene.work.version + 1)),
    Trick("ancient version", Result.WRONG_VERSION, lambda scene: scene.send(version=0)),
    Trick("somebody's update id", Result.DUPLICATE, lambda scene: scene.send(update_id=scene.letter_id)),
    early("another job", Result.NOT_ASSIGNED, lambda scene: scene.send(job_id=scene.other_job), job="other"),
    early("no job", Result.UNKNOWN_JOB, lambda scene: scene.send(job_id="0" * 32), job="none"),
    early("somebody's work", Result.NOT_ASSIGNED, lambda scene: scene.send(assignment_id=scene.others.assignment_id)),
    early("work of nobody", Result.NOT_ASSIGNED, lambda scene: scene.send(assignment_id="0" * 32)),
    early(
        "work of a closed round",
        Result.TOO_LATE,
        lambda scene: scene.send(assignment_id=scene.earlier.assignment_id, version=scene.earlier.version),
    ),
    early("another federation", Result.BAD_SIGNATURE, lambda scene: scene.send(federation="elsewhere"), job="none"),
    early(
        "somebody's letter",
        Result.BAD_SIGNATURE,
        lambda scene: scene.foul.transport.send_update(*scene.letter),
        job="none",
    ),
    early(
        "no header",
        Result.MALFORMED,
        lambda scene: scene.foul.transport.send_update(NO_HEADER, scene.foul.sign(NO_HEADER), b""),
        job="none",
    ),
]

# Some need an earlier round.
PLAYED = [TRICKS[0], *TRICKS]


def job_of(rounds: int) -> Job:
    return small_job(cohort=3, quorum=2, rounds=rounds)


def model(history: list[Tree]) -> list[tuple[object, ...]]:
    return [(row["sha256"], row["num_updates"], row["num_examples"]) for row in history]


async def without_the_foul_one(deployment: Deployment, rounds: int) -> list[tuple[object, ...]]:
    """Run the job with a third client that declines it."""
    async with crew(deployment, *HONEST, FOUL) as (ann, berta, foul):
        job_id = await asyncio.to_thread(deployment.submit, job_of(rounds))
        honest = [asyncio.create_task(member.finish()) for member in (ann, berta)]
        work = await foul.work_until(WorkKind.TRAIN, 0)
        await foul.player.session.send(Decline(work.assignment_id, "no"))
        await asyncio.gather(*honest)
        return model(await asyncio.to_thread(deployment.finish, job_id))


async def test_every_trick_is_refused_counted_and_logged_and_the_model_is_that_of_the_others(
    deployment: Deployment,
) -> None:
    rounds = len(PLAYED)
    expected = await without_the_foul_one(deployment, rounds)
    nobodys = parse_job(small_job().model_dump(mode="json") | {"task": {"name": "unheard-of"}}, "job")
    other_job = await asyncio.to_thread(deployment.submit, nobodys)
    job_id = await asyncio.to_thread(deployment.submit, job_of(rounds))
    async with crew(deployment, *HONEST, FOUL) as (ann, berta, foul):
        before: tuple[list[Assignment], Letter] | None = None
        for version, trick in enumerate(PLAYED):
            works = await asyncio.gather(*(one.work_until(WorkKind.TRAIN, version) for one in (ann, berta, foul)))
            letter = (*ann.signed(ann.header(works[0])), ann.frame(works[0]))
            if before is None:  # the first trick needs none of that
                before = works, letter
            (annas, _, earlier), old_letter = before
            scene = Scene(foul, works[2], earlier, works[0], old_letter, annas.assignment_id, other_job)
            state = await trick.play(scene)
            assert (state.result, bool(state.text)) == (trick.result, True), trick
            if not trick.is_final:
                assert (await scene.poison(float("nan"))).result is Result.NOT_FINITE, f"after {trick}"
            assert (await ann.transport.send_update(*letter)).result is Result.ACCEPTED, f"after {trick}"
            assert (await berta.answer(works[1])).result is Result.ACCEPTED, f"after {trick}"
            before = works, letter
        await asyncio.gather(*(member.finish() for member in (ann, berta, foul)))
    assert model(await asyncio.to_thread(deployment.finish, job_id)) == expected

    labels = {"this": job_id, "other": other_job, "none": ""}
    refused = Counter((labels[trick.job], str(trick.result)) for trick in PLAYED)
    refused[job_id, str(Result.NOT_FINITE)] += sum(not trick.is_final for trick in PLAYED)
    logged = Counter((entry["job"], entry["result"]) for entry in deployment.server.events("update", client=FOUL))
    assert logged == refused
    assert counted(deployment) == refused


def counted(deployment: Deployment) -> Counter[tuple[str, str]]:
    """Return what `roundtable_updates_total` has of refused updates."""
    found = re.findall(
        r'^roundtable_updates_total\{job="(.*)",result="(.*)"\} (.*)$', deployment.metrics(), re.MULTILINE
    )
    return Counter({(job, result): int(float(n)) for job, result, n in found if result != "accepted" and float(n)})


# -- frames in chunks ------------------------------------------------------------------------------------------------

FRAME_BYTES = len(RAW.encode(zeros(0), NO_DRAWS))
END = FRAME_BYTES + 1

# What is sent as (first byte, byte after the last) at which offset; how much of it the server keeps.
CHUNKS: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "cut short": ([(0, 30, 0), (30, 60, 30)], 60),
    "out of order": ([(30, 60, 30), (0, 30, 0)], 0),
    "a gap": ([(0, 30, 0), (31, 60, 31)], 30),
    "the same chunk twice": ([(0, 30, 0), (0, 30, 0)], 30),
    "an overlap": ([(0, 30, 0), (29, 60, 29)], 30),
    "a chunk from elsewhere": ([(0, 30, 0), (30, 60, 2**63)], 30),
    "bytes after the end": ([(0, 30, 0), (30, END, 30)], 30),
    "a chunk after the end": ([(0, 30, 0), (30, FRAME_BYTES, 30), (FRAME_BYTES, END, FRAME_BYTES)], FRAME_BYTES),
}


async def test_chunks_that_do_not_follow_one_another_are_refused_and_the_upload_goes_on(deployment: Deployment) -> None:
    """Each in a round of its own, which closes with the one update, resumed where the server says."""
    job_id = await asyncio.to_thread(deployment.submit, small_job(rounds=len(CHUNKS)))
    async with crew(deployment, "ann") as (ann,):
        await ann.finish()
        expected = model(await asyncio.to_thread(deployment.finish, job_id))
        job_id = await asyncio.to_thread(deployment.submit, small_job(rounds=len(CHUNKS)))
        who = ann.identity
        channel = secure_channel(who.server, who.ca_pem, who.certificate_pem, who.key_pem)
        for version, (name, (chunks, kept)) in enumerate(CHUNKS.items()):
            work = await ann.work_until(WorkKind.TRAIN, version)
            header, frame = ann.header(work), ann.frame(work)
            letter = ann.signed(header)
            state = await upload(channel, letter, [(offset, (frame + b"!")[a:b]) for a, b, offset in chunks])
            refused = "" if name == "cut short" else "wrong-size"
            assert (state.result, bool(state.text)) == (refused, bool(refused)), name
            assert (await ann.transport.upload_state(header.update_id)).received_bytes == kept, name
            rest = await ann.transport.upload(*letter, frame, kept)
            assert rest.result is Result.ACCEPTED, name
            assert (await ann.transport.upload_state(header.update_id)).result is Result.ACCEPTED, name
        await ann.finish()
        await channel.close(None)
    assert model(await asyncio.to_thread(deployment.finish, job_id)) == expected
    refused_here = {key: number for key, number in counted(deployment).items() if key[0] == job_id}
    assert refused_here == {(job_id, "wrong-size"): len(CHUNKS) - 1}
    assert len(deployment.server.events("update", client="ann", job=job_id, result="wrong-size")) == len(CHUNKS) - 1


LARGE = Layout.of([("adapter", "w", (3 * CHUNK_BYTES // 8,), "float32")])  # its frame: one chunk and a half


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, CHUNK_BYTES // 4], ids=["in large chunks", "in small chunks"])
async def test_of_ten_times_the_announced_bytes_no_chunk_beyond_the_end_lies_on_disk(
    deployment: Deployment, chunk_bytes: int
) -> None:
    (spool,) = deployment.state.rglob("spool")
    job_id = await asyncio.to_thread(deployment.submit, small_job())
    async with crew(deployment, "ann", layout=LARGE) as (ann,):
        work = await ann.work_until(WorkKind.TRAIN, 0)
        header, frame = ann.header(work), ann.frame(work)
        letter = ann.signed(header)
        kept = header.frame_bytes // chunk_bytes * chunk_bytes
        flood, sizes = 10 * frame, []

        def chunks() -> Iterator[tuple[int, bytes]]:
            for start in range(0, len(flood), chunk_bytes):
                sizes.append(on_disk(spool))
                yield start, flood[start : start + chunk_bytes]

        who = ann.identity
        channel = secure_channel(who.server, who.ca_pem, who.certificate_pem, who.key_pem)
        state = await upload(channel, letter, chunks())
        await channel.close(None)
        assert (state.result, bool(state.text)) == ("wrong-size", True)
        assert max(sizes) <= kept
        assert on_disk(spool) == kept == (await ann.transport.upload_state(header.update_id)).received_bytes
        assert (await ann.transport.upload(*letter, frame, kept)).result is Result.ACCEPTED
        await ann.finish()
    (version_1,) = (row for row in await asyncio.to_thread(deployment.finish, job_id) if row["version"] == 1)
    assert version_1["num_updates"] == 1
    assert {key: number for key, number in counted(deployment).items() if key[0] == job_id} == {
        (job_id, "wrong-size"): 1
    }
    assert len(deployment.server.events("update", client="ann", job=job_id, result="wrong-size")) == 1


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


async def upload(
    channel: grpc.aio.Channel, letter: tuple[bytes, bytes], chunks: Iterable[tuple[int, bytes]]
) -> client_pb2.UploadState:
    """Send these chunks at these offsets, as no client of ours would."""
    header, signature = letter
    opening = client_pb2.UploadOpening(header=header, signature=signature, offset=0)
    parts = (client_pb2.UploadRequest(chunk=client_pb2.Chunk(offset=offset, data=data)) for offset, data in chunks)
    stub: client_pb2_grpc.ClientServiceAsyncStub = client_pb2_grpc.ClientServiceStub(channel)
    return await stub.Upload(chain([client_pb2.UploadRequest(opening=opening)], parts), timeout=30)
