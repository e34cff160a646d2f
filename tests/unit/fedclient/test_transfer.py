"""Downloads into memory that is used again: whatever happens to one, nobody is handed bytes of another version."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fedclient.backoff import Retry
from fedclient.declining import Declined
from fedclient.plans import MAX_JOBS
from fedclient.transfer import Frames
from fedclient.transport.base import Transport
from fedcore.errors import Unreachable, UpdateResult
from fedcore.identity import sign
from fedcore.layout import Layout, Vector
from fedcore.messages import CHUNK_BYTES, MESSAGE_BYTES, SIGNATURE_CONTEXT, Assignment, Piece, WorkKind
from fedcore.rng import stream
from fedsim.transport import InProcessTransport
from tests.support.hand_clock import HandClock
from tests.support.player import RAW, Player, playing
from tests.support.server import running_server, small_job

NUM_VALUES = 3 * CHUNK_BYTES // 4  # of four bytes: three chunks and, for the header, a bit of a fourth
MAX_BYTES = 2 * RAW.max_frame_bytes(NUM_VALUES)
A, B = "a" * 32, "b" * 32


def values_of(job_id: str, version: int, num_values: int = NUM_VALUES) -> Vector:
    return stream(version, job_id).random(num_values, np.float32)


def encoded(values_D: Vector) -> bytes:
    return RAW.encode(values_D, stream(0))


async def at_once(job_id: str, offset: int) -> None:
    """Let every chunk pass, and the other downloads have their turn."""
    await asyncio.sleep(0)


class Source:
    """What a transport downloads from.

    Attributes:
        frames, bases: what is sent, by job and version.
        before_chunk: is told job and offset of each chunk; may wait or raise.
        sent: of which job the chunks were, in their order.
    """

    def __init__(self) -> None:
        self.frames: dict[tuple[str, int], bytes] = {}
        self.bases: dict[tuple[str, int], bytes] = {}
        self.before_chunk: Callable[[str, int], Awaitable[None]] = at_once
        self.sent: list[str] = []

    def publish(self, job_id: str, version: int, num_values: int = NUM_VALUES) -> Assignment:
        frame = self.frames[job_id, version] = encoded(values_of(job_id, version, num_values))
        digest = hashlib.sha256(frame).hexdigest()
        return Assignment("0" * 32, job_id, b"", version, WorkKind.TRAIN, 0, "", digest, len(frame), 600.0)

    async def download(
        self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME
    ) -> AsyncIterator[bytes]:
        source = self.bases if piece is Piece.BASIS else self.frames
        for start in range(offset, len(source[job_id, version]), CHUNK_BYTES):
            await self.before_chunk(job_id, start)
            self.sent.append(job_id)
            yield source[job_id, version][start : start + CHUNK_BYTES]


class Desk:
    """`Frames` over a `Source`; time passes only when a download waits for its next try."""

    def __init__(self) -> None:
        self.source = Source()
        self.clock = HandClock()
        self.frames = Frames(cast("Transport", self.source))

    def retry(self) -> Retry:
        async def pause(seconds: float) -> None:
            self.clock.advance(seconds)

        return Retry(self.clock, self.clock.now_s() + 600, stream(1), pause, lambda: None)

    async def download(self, assignment: Assignment) -> memoryview:
        return await self.frames.download(assignment, MAX_BYTES, self.retry())

    def is_at_hand(self, assignment: Assignment) -> bool:
        """Return whether the frame is there; what is there must be the right one."""
        frame = self.frames.at_hand(assignment)
        assert frame is None or frame == self.source.frames[assignment.job_id, assignment.version]
        return frame is not None


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_each_version_of_a_job_is_decoded_right_out_of_one_buffer(tmp_path: Path) -> None:
    layout = Layout.of([("adapter", "w", (NUM_VALUES,), "float32")])
    rows = [["adapter", "w", [NUM_VALUES], "float32"]]
    async with running_server(tmp_path) as server:
        key = (await server.enrol("alice")).signing_key
        transport = InProcessTransport(server.federation, "alice")
        frames, retry = Frames(transport), Desk().retry()

        async def answer(player: Player, work: Assignment, values_D: Vector) -> None:
            frame = encoded(values_D)
            first = {"layout": rows} if work.kind is WorkKind.INITIALISE else {}
            data = player.header(work, frame, layout_digest=layout.digest, **first).to_bytes()
            state = await transport.upload(data, sign(key, SIGNATURE_CONTEXT, data), frame, 0)
            assert state.result is UpdateResult.ACCEPTED, state.text

        await server.federation.submit(small_job(rounds=2).to_json())
        ones_D = np.ones(NUM_VALUES, np.float32)
        async with playing(transport, key) as player:
            await answer(player, await player.next_work(), ones_D)
            buffers = []
            for version in (0, 1):
                work = await player.next_work()
                assert work.version == version
                assert frames.at_hand(work) is None, "it is too large to come with its assignment"
                frame = await frames.download(work, MAX_BYTES, retry)
                assert len(frame) > MESSAGE_BYTES
                decoded_D = RAW.decode(frame, NUM_VALUES)
                assert decoded_D.tobytes() == ((version + 1) * ones_D).tobytes()
                assert np.shares_memory(decoded_D, np.frombuffer(frame, np.uint8)), "it had to be copied"
                assert frames.at_hand(work) is frame
                buffers.append(frame.obj)
                await answer(player, work, ones_D)
    assert buffers[0] is buffers[1]


def breaks_off(desk: Desk, assignment: Assignment) -> None:
    async def second_chunk_never_comes(_job_id: str, offset: int) -> None:
        if offset >= CHUNK_BYTES:
            raise Unreachable("connection reset")

    desk.source.before_chunk = second_chunk_never_comes


def is_another(desk: Desk, assignment: Assignment) -> None:
    frame = desk.source.frames[assignment.job_id, assignment.version]
    desk.source.frames[assignment.job_id, assignment.version] = frame[:-1] + bytes([frame[-1] ^ 1])


def goes_on(desk: Desk, assignment: Assignment) -> None:
    desk.source.frames[assignment.job_id, assignment.version] += b"!"


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (breaks_off, Unreachable, "gave up at the deadline: connection reset"),
        (is_another, Declined, "was announced"),
        (goes_on, Declined, "goes on after"),
    ],
)
async def test_after_a_failed_download_no_overwritten_frame_is_at_hand(
    desk: Desk, spoil: Callable[[Desk, Assignment], None], error: type[Exception], reason: str
) -> None:
    old, new = desk.source.publish(A, 0), desk.source.publish(A, 1)
    await desk.download(old)
    whole = desk.source.frames[A, 1]
    spoil(desk, new)
    with pytest.raises(error, match=reason):
        await desk.download(new)
    desk.source.frames[A, 1], desk.source.before_chunk = whole, at_once
    assert not desk.is_at_hand(old)
    assert not desk.is_at_hand(new)
    for assignment in (old, new):
        assert await desk.download(assignment) == desk.source.frames[A, assignment.version]
        assert desk.is_at_hand(assignment)


async def test_during_and_after_a_cancelled_download_no_overwritten_frame_is_at_hand(desk: Desk) -> None:
    old, new = desk.source.publish(A, 0), desk.source.publish(A, 1)
    await desk.download(old)
    halfway = asyncio.Event()

    async def stay_at_the_second_chunk(_job_id: str, offset: int) -> None:
        if offset >= CHUNK_BYTES:
            halfway.set()
            await asyncio.Event().wait()

    desk.source.before_chunk = stay_at_the_second_chunk
    task = asyncio.create_task(desk.download(new))
    await asyncio.wait_for(halfway.wait(), 20)
    assert not desk.is_at_hand(old)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert not desk.is_at_hand(old)
    assert not desk.is_at_hand(new)
    desk.source.before_chunk = at_once
    assert await desk.download(old) == desk.source.frames[A, 0]
    assert desk.is_at_hand(old)


async def test_a_frame_that_changed_under_the_download_is_fetched_once_more_from_the_start(desk: Desk) -> None:
    assignment = desk.source.publish(A, 0)
    whole = desk.source.frames[A, 0]
    is_another(desk, assignment)
    offsets = []

    async def mend_at_the_second_try(_job_id: str, offset: int) -> None:
        offsets.append(offset)
        if offsets.count(0) == 2:
            desk.source.frames[A, 0] = whole

    desk.source.before_chunk = mend_at_the_second_try
    assert await desk.download(assignment) == whole
    assert offsets == 2 * [0, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES]


async def test_frames_of_two_jobs_do_not_touch_one_another(desk: Desk) -> None:
    for version in (0, 1):
        works = [desk.source.publish(job_id, version) for job_id in (A, B)]
        desk.source.sent.clear()
        found = await asyncio.gather(*(desk.download(work) for work in works))
        assert desk.source.sent == 4 * [A, B], "they did not interleave"
        assert found == [desk.source.frames[work.job_id, version] for work in works]
        assert all(desk.is_at_hand(work) for work in works)
        await desk.download(desk.source.publish(A, 2))
        assert desk.is_at_hand(works[1]), "the other job's frame is no longer there"


async def test_a_version_of_another_length_gets_a_buffer_of_its_own(desk: Desk) -> None:
    for num_values in (NUM_VALUES - 1, NUM_VALUES, NUM_VALUES + 1):
        old, new = desk.source.publish(A, 0), desk.source.publish(A, 1, num_values)
        first = await desk.download(old)
        second = await desk.download(new)
        is_shared = second.obj is first.obj
        assert is_shared == (num_values == NUM_VALUES)
        assert RAW.decode(second, num_values).tobytes() == values_of(A, 1, num_values).tobytes()
        assert not desk.is_at_hand(old)
        assert desk.is_at_hand(new)
        assert not desk.is_at_hand(replace(new, frame_bytes=new.frame_bytes + 1))


async def test_frames_of_the_newest_jobs_are_kept_and_no_others(desk: Desk) -> None:
    works = [desk.source.publish(f"{number:032x}", 0, num_values=10) for number in range(MAX_JOBS + 1)]
    for work in works:
        await desk.download(work)
    assert [desk.is_at_hand(work) for work in works] == [False] + [True] * MAX_JOBS
