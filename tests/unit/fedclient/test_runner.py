"""The runner against a scripted server: a small real state, reached through an in-process transport that can break."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.backoff import FIRST_S
from fedclient.pieces import Pieces
from fedclient.residuals import MemoryResiduals
from fedclient.runner import ClientRunner
from fedclient.trainer import Evaluation, Stopped, Trained, Work
from fedclient.updates import update_id_of
from fedcodec import build_pipeline
from fedcore.draws import PrivateDraws
from fedcore.errors import FedError, NotFound, Unauthenticated, UnknownPlugin, Unreachable, UpdateResult
from fedcore.identity import verify
from fedcore.jobfile import parse_job
from fedcore.layout import Layout, Vector
from fedcore.messages import (
    CHUNK_BYTES,
    SIGNATURE_CONTEXT,
    Assignment,
    Cancel,
    Decline,
    Heartbeat,
    Hello,
    Piece,
    UpdateHeader,
    UploadState,
    WorkKind,
)
from fedcore.rng import stream
from tests.support.workers import PlainWorker

JOB = parse_job({"job": {"name": "j", "rounds": 3}, "task": {"name": "toy"}, "schedule": {"cohort": 1}}, "test")
JOB_ID = "ab" * 16
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class VirtualClock:
    """Time moves only in `until`, and never while work is marked."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.blocks = 0
        self.sleeps: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def now_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        event = asyncio.Event()
        heapq.heappush(self._sleepers, (self.now + seconds, len(self.sleeps), event))
        await event.wait()

    @contextmanager
    def _work(self) -> Iterator[None]:
        self.blocks += 1
        yield
        self.blocks -= 1

    def working(self) -> AbstractContextManager[None]:
        return self._work()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                for _ in range(50):
                    await asyncio.sleep(0)
                if not condition() and not self.blocks and self._sleepers:
                    self.now, _, event = heapq.heappop(self._sleepers)
                    event.set()


@dataclass
class Worker(PlainWorker):
    """Adds one to every value; `gate` holds training until it is opened, as long local work would."""

    num_values: int = 8
    gate: threading.Event = field(default_factory=threading.Event)
    started: list[int] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    error: BaseException | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def table(self) -> Layout:
        return Layout.of([("adapter", "w", (self.num_values,), "float32")])

    def initialise(self, work: Work) -> tuple[Layout, Vector]:
        return self.table, np.full(self.num_values, 2, np.float32)

    def layout(self, work: Work) -> Layout:
        if work.job.task.name != "toy":
            raise UnknownPlugin(f"unknown task {work.job.task.name!r}: known: toy")
        return self.table

    def train(
        self,
        work: Work,
        base_D: Vector,
        *,
        draws: PrivateDraws | None = None,
        progress: Callable[[float], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Trained:
        self.started.append(work.version)
        assert stop is not None
        assert progress is not None
        progress(0.5)
        while not self.gate.wait(0.001):
            if stop.is_set():
                raise Stopped("stopped")
        if self.error is not None:
            raise self.error
        metrics = {"loss": 0.5, "broken": float("nan")}
        return Trained(np.ones_like(base_D), 10, metrics, self.evaluate(work, base_D))

    def evaluate(self, work: Work, base_D: Vector) -> Evaluation:
        return Evaluation(4, {"mean": float(base_D.mean())})

    def forget(self, job_id: str) -> None:
        self.forgotten.append(job_id)

    def base_digest(self, work: Work) -> str | None:
        return self.base


@dataclass
class ThriftyWorker(Worker):
    """Trains into the same vector each time, as it may: it is the runner's until the next call. Counts in it."""

    delta_D: Vector = field(default_factory=lambda: np.zeros(0, np.float32))  # noqa: N815 - shape suffix

    def __post_init__(self) -> None:
        super().__post_init__()
        self.delta_D = np.zeros(self.num_values, np.float32)

    def train(self, *args: Any, **options: Any) -> Trained:
        trained = super().train(*args, **options)
        self.delta_D += 1
        return replace(trained, delta_D=self.delta_D)


class Server:
    """The other side: what it holds, what it heard, and how it is to misbehave."""

    def __init__(self) -> None:
        self.frames: dict[int, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.headers: dict[str, UpdateHeader] = {}
        self.results: dict[str, UpdateResult] = {}
        self.times_counted: list[str] = []
        self.hellos: list[Hello] = []
        self.events: list[Heartbeat | Decline] = []
        self.offsets: list[int] = []
        self.outgoing: asyncio.Queue[Assignment | Cancel | FedError | None] = asyncio.Queue()
        self.sessions = 0
        self.down = False
        self.revoked = False
        self.downloads_to_cut: list[int] = []  # bytes after which the next downloads break
        self.uploads_to_cut: list[int] = []
        self.answers_to_lose = 0

    @property
    def declines(self) -> list[Decline]:
        return [event for event in self.events if isinstance(event, Decline)]

    def check(self) -> None:
        if self.revoked:
            raise Unauthenticated("revoked by the operator")
        if self.down:
            raise Unreachable("connection refused")

    def go_down(self) -> None:
        self.down = True
        self.hang_up()

    def hang_up(self) -> None:
        self.outgoing.put_nowait(Unreachable("connection reset"))

    def finish(self, header_bytes: bytes, signature: bytes, frame: bytes) -> UploadState:
        verify(KEY.public_key().public_bytes_raw(), SIGNATURE_CONTEXT, header_bytes, signature)
        header = UpdateHeader.from_bytes(header_bytes)
        assert header.frame_digest == hashlib.sha256(frame).hexdigest()
        if header.update_id not in self.results:
            self.results[header.update_id] = UpdateResult.ACCEPTED
            self.headers[header.update_id] = header
            self.uploads[header.update_id] = bytearray(frame)
            self.times_counted.append(header.assignment_id)
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            raise Unreachable("the answer was lost")
        return UploadState(len(frame), self.results[header.update_id])


class Link:
    """`Session` and `Transport` over a `Server`."""

    heartbeat_interval_s = 5.0
    federation = "fed"
    client = "c1"

    def __init__(self, server: Server) -> None:
        self.server = server

    @asynccontextmanager
    async def connect(self, hello: Hello) -> AsyncIterator[Link]:
        self.server.hellos.append(hello)
        self.server.check()
        self.server.sessions += 1
        try:
            yield self
        finally:
            self.server.sessions -= 1

    async def orders(self) -> AsyncIterator[Assignment | Cancel]:
        while (order := await self.server.outgoing.get()) is not None:
            if isinstance(order, FedError):
                raise order
            yield order

    async def send(self, event: Heartbeat | Decline) -> None:
        self.server.check()
        self.server.events.append(event)

    async def download(
        self, job_id: str, version: int, offset: int, piece: Piece = Piece.FRAME
    ) -> AsyncIterator[bytes]:
        self.server.check()
        self.server.offsets.append(offset)
        if version not in self.server.frames:
            raise NotFound(f"no version {version}")
        frame = self.server.frames[0]
        end = self.server.downloads_to_cut.pop(0) if self.server.downloads_to_cut else len(frame)
        for start in range(offset, end, 7):
            yield frame[start : min(start + 7, end)]
        if end < len(frame):
            self.server.hang_up()
            raise Unreachable("connection reset")

    async def upload_state(self, update_id: str) -> UploadState:
        self.server.check()
        held = len(self.server.uploads.get(update_id, b""))
        return UploadState(held, self.server.results.get(update_id))

    async def upload(self, header: bytes, signature: bytes, frame: bytes | Pieces, offset: int) -> UploadState:
        self.server.check()
        self.server.offsets.append(offset)
        held = self.server.uploads.setdefault(UpdateHeader.from_bytes(header).update_id, bytearray())
        assert len(held) == offset
        end = self.server.uploads_to_cut.pop(0) if self.server.uploads_to_cut else len(frame)
        held += frame[offset:end]
        if end < len(frame):
            raise Unreachable("connection reset")
        return self.server.finish(header, signature, bytes(held))

    async def send_update(self, header: bytes, signature: bytes, frame: bytes) -> UploadState:
        self.server.check()
        return self.server.finish(header, signature, frame)

    async def close(self) -> None:
        return


class House:
    """A runner, its worker, its server and the clock; use it as a context."""

    def __init__(self, num_values: int = 8, seed: int = 1, worker_type: type[Worker] = Worker) -> None:
        self.clock = VirtualClock()
        self.server = Server()
        self.worker = worker_type(num_values)
        self.executor = ThreadPoolExecutor(1)
        self.about = Hello("test", "cpu", ("toy",), ("full",), ("raw",))
        self.runner = ClientRunner(
            Link(self.server),
            self.worker,
            KEY,
            about=self.about,
            clock=self.clock,
            executor=self.executor,
            rng=stream(seed, "jitter"),
            residuals=MemoryResiduals(),
        )
        self.publish(0)

    def publish(self, version: int) -> None:
        values_D = np.full(self.worker.num_values, version, np.float32)
        pipeline = build_pipeline([{"codec": "raw"}])
        self.server.frames[version] = pipeline.encode(values_D, stream(0))

    def assign(self, number: int, **changes: object) -> Assignment:
        frame = self.server.frames[0]
        fields: dict[str, object] = {
            "assignment_id": f"{number:032x}",
            "job_id": JOB_ID,
            "job": JOB.to_json(),
            "version": 0,
            "kind": WorkKind.TRAIN,
            "seed": 5,
            "layout_digest": self.worker.table.digest,
            "frame_digest": hashlib.sha256(frame).hexdigest(),
            "frame_bytes": len(frame),
            "deadline_s": 600.0,
        }
        assignment = Assignment(**{**fields, **changes})  # type: ignore[arg-type]
        self.server.outgoing.put_nowait(assignment)
        return assignment

    def header(self, assignment: Assignment) -> UpdateHeader:
        return self.server.headers[update_id_of(assignment.assignment_id)]

    def frame(self, assignment: Assignment) -> bytes:
        return bytes(self.server.uploads[update_id_of(assignment.assignment_id)])

    async def counted(self, number: int) -> None:
        await self.clock.until(lambda: len(self.server.times_counted) >= number)

    async def greeted(self, number: int) -> None:
        await self.clock.until(lambda: len(self.server.hellos) >= number)

    async def declined(self) -> str:
        await self.clock.until(lambda: self.server.declines)
        return self.server.declines[0].reason


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with running(House()) as house:
        yield house


@asynccontextmanager
async def running(house: House) -> AsyncIterator[House]:
    task = asyncio.create_task(house.runner.run())
    try:
        yield house
        house.worker.gate.set()
        house.runner.stop()
        await house.clock.until(task.done)
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        house.executor.shutdown()
    assert house.clock.blocks == 0
    assert house.server.sessions == 0


async def test_training_ends_in_a_signed_update(house: House) -> None:
    assignment = house.assign(1)
    await house.counted(1)
    header = house.header(assignment)
    assert (header.federation, header.kind, header.version, header.num_examples) == ("fed", "train", 0, 10)
    assert (header.evaluated_examples, header.evaluation) == (4, {"mean": 0.0})
    delta_D = build_pipeline([{"codec": "raw"}]).decode(house.frame(assignment), 8)
    assert delta_D.tolist() == [1.0] * 8


async def test_a_metric_that_is_not_finite_is_left_out(house: House) -> None:
    assignment = house.assign(1)
    await house.counted(1)
    assert house.header(assignment).metrics == {"loss": 0.5}


async def test_initialising_sends_layout_and_values(house: House) -> None:
    assignment = house.assign(1, kind=WorkKind.INITIALISE, layout_digest="", frame_digest="", frame_bytes=0)
    await house.counted(1)
    header = house.header(assignment)
    assert json.dumps(header.layout, separators=(",", ":")).encode() == house.worker.table.to_json()
    assert header.num_examples == 0
    assert build_pipeline([{"codec": "raw"}]).decode(house.frame(assignment), 8).tolist() == [2.0] * 8


async def test_evaluating_sends_figures_and_no_frame(house: House) -> None:
    assignment = house.assign(1, kind=WorkKind.EVALUATE)
    await house.counted(1)
    header = house.header(assignment)
    assert (header.frame_bytes, header.frame_digest) == (0, hashlib.sha256(b"").hexdigest())
    assert (header.num_examples, header.evaluated_examples) == (0, 4)


async def test_training_and_evaluating_a_version_share_one_download(house: House) -> None:
    house.assign(1)
    house.assign(2, kind=WorkKind.EVALUATE)
    await house.counted(2)
    assert house.server.offsets == [0]


async def test_a_broken_download_goes_on_where_it_stopped(house: House) -> None:
    house.server.downloads_to_cut = [20, 30]
    house.assign(1)
    await house.counted(1)
    assert house.server.offsets == [0, 20, 30]


async def test_a_broken_upload_goes_on_from_what_the_server_holds() -> None:
    async with running(House(num_values=CHUNK_BYTES // 2)) as house:
        house.server.uploads_to_cut = [700_000, 1_500_000]
        assignment = house.assign(1)
        await house.counted(1)
        assert house.server.offsets[1:] == [0, 700_000, 1_500_000]
        assert len(house.frame(assignment)) == house.header(assignment).frame_bytes > CHUNK_BYTES


async def test_an_update_in_pieces_is_sent_whole_before_the_next_work_touches_its_values() -> None:
    async with running(House(CHUNK_BYTES // 2, worker_type=ThriftyWorker)) as house:
        house.worker.gate.clear()
        works = [house.assign(number) for number in range(2)]
        await house.clock.until(lambda: len(house.runner._hand.ids) == 2 and house.worker.started)
        house.server.uploads_to_cut = [700_000, 1_500_000]
        house.worker.gate.set()
        await house.counted(2)
        assert house.server.offsets[1:] == [0, 700_000, 1_500_000, 0]
        for number, work in enumerate(works, 1):
            delta_D = build_pipeline([{"codec": "raw"}]).decode(house.frame(work), house.worker.num_values)
            assert (delta_D == number).all()


@pytest.mark.parametrize("num_values", [8, CHUNK_BYTES // 2])
async def test_an_update_whose_answer_was_lost_counts_once(num_values: int) -> None:
    async with running(House(num_values)) as house:
        house.server.answers_to_lose = 2
        house.assign(1)
        await house.clock.until(lambda: not house.runner._hand.ids and house.server.results)
        assert len(house.server.times_counted) == 1


async def test_work_outlives_an_outage_of_the_server(house: House) -> None:
    house.worker.gate.clear()
    assignment = house.assign(1)
    await house.clock.until(lambda: house.worker.started)
    house.server.go_down()
    house.worker.gate.set()
    await house.clock.until(lambda: len(house.server.hellos) >= 4)
    assert house.server.times_counted == []
    house.server.down = False
    await house.counted(1)
    assert all(hello.assignment_ids == (assignment.assignment_id,) for hello in house.server.hellos[1:4])
    assert house.worker.started == [0]


@pytest.mark.parametrize("seed", range(6))
async def test_session_and_update_wake_each_other_after_an_outage(seed: int) -> None:
    async with running(House(seed=seed)) as house:
        house.worker.gate.clear()
        house.assign(1)
        await house.clock.until(lambda: house.worker.started)
        house.server.go_down()
        house.worker.gate.set()
        await house.clock.until(lambda: len(house.server.hellos) >= 8)
        house.server.down = False
        await house.clock.until(lambda: house.server.sessions or house.server.times_counted)
        first_s = house.clock.now
        await house.clock.until(lambda: house.server.sessions and house.server.times_counted)
        assert house.clock.now == first_s


async def test_at_the_deadline_an_undelivered_update_is_given_up(house: House) -> None:
    house.worker.gate.clear()
    house.assign(1, deadline_s=30.0)
    await house.clock.until(lambda: house.worker.started)
    house.server.go_down()
    house.worker.gate.set()
    await house.clock.until(lambda: not house.runner._hand.ids)
    assert house.clock.now <= 1030.0
    house.server.down = False
    assert "gave up at the deadline" in await house.declined()


async def test_an_assignment_in_hand_is_not_started_twice(house: House) -> None:
    house.worker.gate.clear()
    house.assign(1)
    await house.clock.until(lambda: house.worker.started)
    house.assign(1)
    house.assign(2)
    await house.clock.until(lambda: len(house.runner._hand.ids) == 2)
    house.worker.gate.set()
    await house.counted(2)
    assert len(house.worker.started) == 2


async def test_cancelled_training_stops_and_the_next_work_begins(house: House) -> None:
    house.worker.gate.clear()
    cancelled, waiting, last = house.assign(1), house.assign(2), house.assign(3)
    await house.clock.until(lambda: len(house.runner._hand.ids) == 3 and house.worker.started)
    house.server.outgoing.put_nowait(Cancel(waiting.assignment_id, "round closed"))
    house.server.outgoing.put_nowait(Cancel(cancelled.assignment_id, "round closed"))
    await house.clock.until(lambda: len(house.worker.started) == 2)
    house.worker.gate.set()
    await house.counted(1)
    assert house.server.times_counted == [last.assignment_id]
    assert house.server.declines == []


@pytest.mark.parametrize("kind", [WorkKind.INITIALISE, WorkKind.TRAIN])
@pytest.mark.parametrize("own", ["ab" * 32, None])
async def test_another_base_model_is_declined_before_a_download_with_both_digests(
    house: House, kind: WorkKind, own: str | None
) -> None:
    house.worker.base = own
    house.assign(1, kind=kind, base_digest="cd" * 32)
    await house.clock.until(lambda: house.server.declines)
    (decline,) = house.server.declines
    assert "cd" * 32 in decline.reason
    assert (own or "nothing is frozen") in decline.reason
    assert not decline.transient
    assert (house.server.offsets, house.server.headers, house.worker.started) == ([], {}, [])


@pytest.mark.parametrize("own", ["ab" * 32, None])
async def test_version_0_says_what_base_model_it_was_made_with_and_updates_do_not(
    house: House, own: str | None
) -> None:
    house.worker.base = own
    first = house.assign(1, kind=WorkKind.INITIALISE, layout_digest="", frame_digest="", frame_bytes=0)
    other = house.assign(2, base_digest=own or "")
    await house.counted(2)
    assert house.header(first).base_digest == own
    assert house.header(other).base_digest is None


async def test_another_layout_is_declined_with_both_digests(house: House) -> None:
    house.assign(1, layout_digest="f" * 64)
    reason = await house.declined()
    assert house.worker.table.digest in reason
    assert "f" * 64 in reason
    assert house.server.offsets == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"job": b"{"}, "not JSON"),
        ({"job": JOB.to_json().replace(b'"toy"', b'"tyo"')}, "unknown task 'tyo'"),
        ({"job": JOB.to_json().replace(b'"codec":"raw"', b'"codec":"rwa"')}, "unknown codec 'rwa'"),
        ({"job": JOB.to_json().replace(b'"codec":"raw"', b'"codec":"raw","x":1')}, "x: unknown key"),
        ({"job": JOB.to_json().replace(b'"rounds":3', b'"rounds":0')}, "job.rounds"),
        ({"frame_bytes": 1 << 40}, "bytes was announced"),
        ({"frame_bytes": 0}, "bytes was announced"),
        ({"frame_bytes": 10}, "goes on after the 10 bytes"),
        ({"frame_digest": "0" * 64}, "0000 was announced"),
        ({"version": 7}, "no version 7"),
        ({"deadline_s": 0.0}, "deadline of 0 s passed"),
    ],
)
async def test_what_cannot_be_done_is_declined_with_the_reason(
    house: House, changes: dict[str, object], reason: str
) -> None:
    house.assign(1, **changes)
    assert reason in await house.declined()
    house.assign(2)
    await house.counted(1)


@pytest.mark.parametrize(
    "error", [RuntimeError("no such camera"), SystemExit("no such camera"), KeyError("no such camera")]
)
async def test_a_task_that_fails_is_declined_and_the_client_lives_on(house: House, error: BaseException) -> None:
    house.worker.error = error
    house.assign(1)
    reason = await house.declined()
    assert reason.startswith(f"task failed: {type(error).__name__}: ")
    assert "no such camera" in reason
    house.worker.error = None
    house.assign(2)
    await house.counted(1)


async def test_more_than_the_client_holds_is_declined(house: House) -> None:
    house.worker.gate.clear()
    for number in range(65):
        house.assign(number)
    assert "64 assignments are in hand" in await house.declined()


async def test_heartbeats_name_the_work_and_its_progress(house: House) -> None:
    await house.clock.until(lambda: house.server.events)
    assert house.server.events == [Heartbeat()]
    assert house.clock.now == 1005.0
    house.worker.gate.clear()
    assignment = house.assign(1)
    await house.clock.until(lambda: house.worker.started)
    house.clock.blocks -= 1  # let time run while the work goes on, as on a real clock
    await house.clock.until(lambda: len(house.server.events) >= 2)
    house.clock.blocks += 1
    assert house.server.events[1] == Heartbeat(assignment.assignment_id, 0.5)


async def test_reconnecting_waits_longer_each_time_up_to_twenty_seconds() -> None:
    async with running(House()) as house:
        await house.clock.until(lambda: house.server.sessions)
        house.server.go_down()
        before = len(house.clock.sleeps)
        await house.clock.until(lambda: len(house.server.hellos) >= 60)
        waits = house.clock.sleeps[before:]
        assert all(wait <= 0.2 * 2**number for number, wait in enumerate(waits[:7]))
        assert 15 < max(waits) <= 20
        assert min(waits[10:]) < 5
        house.server.down = False


def waits(house: House) -> list[float]:
    """Return how long it waited for its next tries."""
    return [seconds for seconds in house.clock.sleeps if seconds != Link.heartbeat_interval_s]


async def test_short_sessions_of_use_are_followed_by_the_next_at_once(house: House) -> None:
    for number in range(20):
        house.assign(number)
        await house.counted(number + 1)
        await house.clock.until(lambda: not house.runner._hand.ids)
        house.server.hang_up()
        await house.greeted(number + 2)
    assert len(waits(house)) >= 20
    assert max(waits(house)) <= FIRST_S


async def test_a_download_over_a_line_that_breaks_after_every_chunk_gets_on() -> None:
    async with running(House(num_values=64)) as house:
        house.server.downloads_to_cut = list(range(7, len(house.server.frames[0]), 7))
        house.assign(1)
        await house.counted(1)
        assert len(house.server.hellos) > 20, "the sessions broke with it"
        assert max(waits(house)) <= FIRST_S


async def test_short_sessions_of_no_use_are_spaced(house: House) -> None:
    for number in range(20):
        await house.clock.until(lambda: house.server.sessions)
        house.server.hang_up()
        await house.greeted(number + 2)
    assert max(waits(house)) > 10


async def test_a_revoked_client_ends_and_says_why() -> None:
    house = House()
    house.server.revoked = True
    with pytest.raises(Unauthenticated, match="revoked by the operator"):
        await house.runner.run()
    house.executor.shutdown()


async def test_revocation_in_the_middle_of_work_stops_the_work() -> None:
    house = House()
    house.worker.gate.clear()
    house.assign(1)
    task = asyncio.create_task(house.runner.run())
    await house.clock.until(lambda: house.worker.started)
    house.server.revoked = True
    house.server.outgoing.put_nowait(Unauthenticated("revoked by the operator"))
    with pytest.raises(Unauthenticated, match="revoked by the operator"):
        await task
    assert house.clock.blocks == 0
    house.executor.shutdown()


async def test_stopping_breaks_off_training_and_declines_what_is_in_hand() -> None:
    house = House()
    house.worker.gate.clear()
    house.assign(1)
    house.assign(2)
    task = asyncio.create_task(house.runner.run())
    await house.clock.until(lambda: house.worker.started and len(house.runner._hand.ids) == 2)
    house.runner.stop()
    await task
    assert [decline.reason for decline in house.server.declines] == ["the client is shutting down"] * 2
    assert (house.server.sessions, house.clock.blocks) == (0, 0)
    house.executor.shutdown()


async def test_stopping_without_a_server_does_not_wait_for_one() -> None:
    house = House()
    house.server.down = True
    task = asyncio.create_task(house.runner.run())
    await house.clock.until(lambda: len(house.server.hellos) > 1)
    house.runner.stop()
    await task
    house.executor.shutdown()


async def test_models_of_old_jobs_are_forgotten(house: House) -> None:
    for number in range(6):
        house.assign(number, job_id=f"{number:032x}")
    await house.counted(6)
    assert house.worker.forgotten == [f"{number:032x}" for number in range(2)]


async def test_the_same_assignment_gives_the_same_bytes_again() -> None:
    updates = []
    for _ in range(2):
        async with running(House()) as house:
            assignment = house.assign(1)
            await house.counted(1)
            updates.append((house.header(assignment).to_bytes(), house.frame(assignment)))
    assert updates[0] == updates[1]
