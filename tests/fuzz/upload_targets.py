"""Uploads in chunks, over several connections, beside a model of what the server should hold."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcore.clock import SystemClock
from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.identity import sign
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, UpdateHeader, UploadState, WorkKind
from fedserver.federation import Federation
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.intake import Upload
from fedserver.rounds.services import Services
from fedserver.state.journal import Journal
from fedserver.state.memory import MemoryBlobs, MemoryStore
from fedsim.transport import InProcessTransport
from tests.fuzz.target import Reader, Target, check_rejection
from tests.support.player import HELLO, LAYOUT, RAW
from tests.support.server import FEDERATION, small_job

KEY: Final = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
FRAME: Final = RAW.encode(np.arange(LAYOUT.num_values, dtype=np.float32), np.random.default_rng(0))
UPDATES: Final = ("a" * 32, "b" * 32)
CONNECTIONS: Final = 8
ANSWER_S: Final = 30.0  # for everything together, which takes milliseconds
WORKERS: Final = ThreadPoolExecutor(2)


def use_uploads(data: bytes) -> None:
    asyncio.run(play(Reader(data)))


async def play(reader: Reader) -> None:
    async with asyncio.timeout(ANSWER_S), federation() as server:
        await server.submit(small_job().to_json())
        seat = server.join("alice", HELLO)
        orders = seat.orders()
        work = await anext(orders)
        assert isinstance(work, Assignment)
        client = Client(server, work)
        while not reader.is_empty:
            await client.act(reader)
        if client.settled is not None and client.settled[1].result is UpdateResult.ACCEPTED:
            while not isinstance(work := await anext(orders), Assignment) or work.version != 0:
                pass
            chunks = InProcessTransport(server, "alice").download(work.job_id, 0, 0)
            assert b"".join([chunk async for chunk in chunks]) == FRAME  # the downlink is raw too


@asynccontextmanager
async def federation() -> AsyncIterator[Federation]:
    """A server without a wire, its state in memory."""
    clock, store = SystemClock(), MemoryStore()
    journal = Journal(store, clock)
    services = Services(store, journal, MemoryBlobs(), Fleet(), clock, Metrics(now=clock.now_s), WORKERS)
    server = Federation(services, FEDERATION, lambda _: KEY.public_key().public_bytes_raw())
    running = asyncio.create_task(server.run())
    await server.recovered.wait()
    try:
        yield server
    finally:
        running.cancel()
        await asyncio.wait({running})
        await journal.close()


class Client:
    """A client that uploads in any order, on many connections, and knows what the server must answer.

    Attributes:
        held: what has arrived of each update; beginning one forgets the other.
        connections: uploads that are open, with the update of each and whether it has been given up since.
        settled: the update that was judged, and the judgement.
    """

    def __init__(self, server: Federation, work: Assignment) -> None:
        self.server = server
        self.work = work
        self.held: dict[str, bytearray] = {}
        self.connections: list[tuple[str, bytearray, Upload]] = []
        self.settled: tuple[str, UploadState] | None = None

    async def act(self, reader: Reader) -> None:
        operation = reader.number() % 8
        if operation == 0:
            await self.announce(UPDATES[reader.number() % 2])
        elif operation == 1:
            await self.check_state(UPDATES[reader.number() % 2])
        elif self.connections:
            update_id, held, upload = self.connections[reader.number() % len(self.connections)]
            match operation:
                case 2:
                    await self.finish(update_id, held, upload)
                case 3:  # a chunk from anywhere, with anything in it
                    await self.append(update_id, held, upload, reader.number(), reader.take(reader.number()))
                case 4:  # the same chunk on two connections at once: one of them is late
                    chunk = FRAME[len(held) : len(held) + 1 + reader.number()]
                    await self.append_twice(update_id, held, upload, chunk)
                case _:
                    await self.append(update_id, held, upload, len(held), FRAME[len(held) :][: 1 + reader.number()])

    async def announce(self, update_id: str) -> None:
        header = UpdateHeader(
            federation=FEDERATION,
            update_id=update_id,
            assignment_id=self.work.assignment_id,
            job_id=self.work.job_id,
            version=0,
            kind=WorkKind.INITIALISE,
            layout_digest=LAYOUT.digest,
            frame_bytes=len(FRAME),
            frame_digest=hashlib.sha256(FRAME).hexdigest(),
            num_examples=0,
            layout=[[t.group, t.name, list(t.shape), t.dtype] for t in LAYOUT.tensors],
        ).to_bytes()
        try:
            announced = await self.server.intake.announce("alice", header, sign(KEY, SIGNATURE_CONTEXT, header))
        except UpdateRejected:
            assert self.settled is not None
            assert self.settled[0] != update_id
            return
        if isinstance(announced, UploadState):
            assert self.settled == (update_id, announced)
            return
        assert self.settled is None
        upload = self.server.intake.upload(announced)
        if update_id not in self.held:
            self.held = {update_id: bytearray()}
        self.connections = [*self.connections, (update_id, self.held[update_id], upload)][-CONNECTIONS:]
        assert upload.num_bytes == len(self.held[update_id])

    async def check_state(self, update_id: str) -> None:
        state = await self.server.intake.state_of("alice", update_id)
        if self.settled is None:
            assert state == UploadState(len(self.held.get(update_id, b"")))
        else:
            assert state == (self.settled[1] if self.settled[0] == update_id else UploadState(0))

    async def append(self, update_id: str, held: bytearray, upload: Upload, offset: int, chunk: bytes) -> None:
        fits = offset == len(held) and offset + len(chunk) <= len(FRAME)
        try:
            await upload.append(offset, chunk)
        except UpdateRejected as error:
            # An upload that was judged may still say that the chunk does not fit.
            is_late = self.is_given_up(update_id, held) or (fits and self.settled is not None)
            check_rejection(error, UpdateResult.TOO_LATE if is_late else UpdateResult.WRONG_SIZE)
            assert is_late or not fits
        else:
            assert fits
            assert not self.is_over(update_id, held)
            held += chunk
            assert upload.num_bytes == len(held)
        assert upload.complete == (upload.num_bytes == len(FRAME))

    async def append_twice(self, update_id: str, held: bytearray, upload: Upload, chunk: bytes) -> None:
        calls = (upload.append(len(held), chunk), upload.append(len(held), chunk))
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        if self.is_over(update_id, held) or not chunk:
            return
        assert first is None
        assert isinstance(second, UpdateRejected)
        held += chunk

    async def finish(self, update_id: str, held: bytearray, upload: Upload) -> None:
        if not upload.complete:  # the service does not ask then
            return
        try:
            state = await upload.finish()
        except UpdateRejected as error:
            check_rejection(error, UpdateResult.TOO_LATE)
            assert self.is_given_up(update_id, held)
            return
        if self.settled is not None:
            assert self.settled == (update_id, state)
        else:
            assert not self.is_given_up(update_id, held)
            right = UpdateResult.ACCEPTED if held == FRAME else UpdateResult.WRONG_DIGEST
            assert state.result is right, state
            assert state.received_bytes == len(FRAME)
            self.settled = update_id, state

    def is_given_up(self, update_id: str, held: bytearray) -> bool:
        """Whether another update was begun since."""
        return self.held.get(update_id) is not held

    def is_over(self, update_id: str, held: bytearray) -> bool:
        """Whether nothing more may arrive."""
        return self.settled is not None or self.is_given_up(update_id, held)


def upload_uses() -> Iterator[bytes]:
    begin, some, rest, finish = b"\0\0", b"\5\0\x10", b"\5\0\xff", b"\2\0"
    yield begin + some + b"\1\0" + rest + finish + b"\1\0" + begin
    yield begin + some + b"\3\0\x11\2xx" + b"\3\0\0\1x" + b"\1\0" + rest + finish + b"\0\1"
    yield begin + some + b"\0\1" + b"\5\1\x08" + b"\5\0\1" + b"\1\0\1\1" + begin + b"\5\2\xff\2\2"
    yield begin + begin + b"\4\1\x20" + b"\3\0\x21\xff" + bytes(200) + rest + finish + b"\2\1"


TARGETS: Final = (Target("upload", use_uploads, upload_uses, max_bytes=512, runs=200),)
