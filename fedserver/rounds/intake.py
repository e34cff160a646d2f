"""The way of an update into the server: announce → receive → check → journal → fold → acknowledge.

**Journal first, acknowledge after**: the answer "accepted" leaves this module only when the frame and the record that
names it are durable. A rejection of work that was assigned is durable too, so asking again gives the same answer.

Methods run on the event loop's thread; what takes long (large frames, the disk) happens in worker threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

from fedcore.errors import NotFound, StateError, UpdateRejected, UpdateResult
from fedcore.messages import MESSAGE_BYTES, UpdateHeader, UploadState
from fedserver.rounds.admission import check_frame, check_header, check_signature, find_attempt
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.engine import JobEngine
from fedserver.rounds.scheduler import Accepted, Drop, Dropped
from fedserver.rounds.services import Services
from fedserver.state.base import Bytes, Spool
from fedserver.state.records import UpdateRecord
from fedserver.state.vault import SMALL_BYTES, Kept, passing

log = logging.getLogger(__name__)
T = TypeVar("T")
LIGHT_VALUES: Final = 1 << 16
"""Layouts of at most so many values are checked and folded in less than a millisecond."""
SHORT_HEADER_BYTES: Final = 1 << 14
"""More than a header without a layout has, which is read in a tenth of a millisecond."""


class Run(Protocol):
    """Calls a function, here and now or in a worker thread; returns what it returns, raises what it raises."""

    async def __call__(self, call: Callable[[], T]) -> T: ...  # noqa: D102


@dataclass(frozen=True)
class Announced:
    """An update whose header was found in order; its frame may come now."""

    client: str
    header: UpdateHeader
    header_bytes: bytes
    signature: bytes
    engine: JobEngine
    attempt: Attempt


class Upload:
    """A frame on its way in, resumable: `num_bytes` is where to go on."""

    def __init__(self, intake: Intake, announced: Announced, spool: Spool, turn: asyncio.Lock) -> None:
        self._intake = intake
        self._announced = announced
        self._spool = spool
        self._turn = turn  # shared by every connection that sends this update

    @property
    def num_bytes(self) -> int:
        """How much the server holds."""
        return self._spool.num_bytes

    @property
    def complete(self) -> bool:
        """Whether every announced byte is here."""
        return self.num_bytes == self._announced.header.frame_bytes

    async def resume(self) -> int:
        """Return how much the server holds, once nothing more of it is being written."""
        async with self._turn:
            return self.num_bytes

    async def append(self, offset: int, data: Bytes) -> None:
        """Take the next chunk; a caller whose connection breaks meanwhile changes nothing about that.

        Raises:
            UpdateRejected: WRONG_SIZE, the chunk does not start where the last one ended or goes on after the announced
                end; the upload can be resumed. TOO_LATE, the round has closed or the client has begun another one.
                Nothing was taken.
        """
        # The turn is held until the worker is done: another connection would take the same place for free.
        await asyncio.shield(asyncio.create_task(self._append(offset, data)))

    async def _append(self, offset: int, data: Bytes) -> None:
        end = offset + len(data)
        async with self._turn:
            self._check_wanted()
            if offset != self.num_bytes or end > self._announced.header.frame_bytes:
                raise self._refusal(
                    UpdateResult.WRONG_SIZE,
                    f"chunk of bytes {offset} to {end}, expected one from {self.num_bytes} to at most"
                    f" {self._announced.header.frame_bytes}",
                )
            self._intake.received(self._announced, len(data))
            try:
                await self._intake.in_worker(partial(self._spool.append, data))
            except NotFound as error:  # given up since the check
                raise self._refusal(UpdateResult.TOO_LATE, str(error)) from error

    async def finish(self) -> UploadState:
        """Judge the whole update; the answer is durable.

        Raises:
            UpdateRejected: TOO_LATE, the client has begun another upload for this assignment.
        """
        client, header = self._announced.client, self._announced.header
        if (recorded := self._intake.recorded(client, header.update_id)) is not None:  # by another connection
            return recorded
        self._check_wanted()

        def seal() -> Kept:
            try:
                return Kept(self._spool.seal(header.frame_digest, header.frame_bytes), None)
            except NotFound as error:  # given up since the check
                raise UpdateRejected(UpdateResult.TOO_LATE, str(error)) from error

        return await self._intake.settle(self._announced, seal, self._intake.in_worker)

    def _check_wanted(self) -> None:
        if self._turn not in self._announced.attempt.spools.values():
            raise self._refusal(UpdateResult.TOO_LATE, "another upload for this assignment has begun since")

    def _refusal(self, reason: UpdateResult, text: str) -> UpdateRejected:
        """Count and log a refusal before the whole frame is here, and return it."""
        self._intake.count(self._announced.header.job_id, self._announced.client, reason, text)
        return UpdateRejected(reason, text)


class Intake:
    """See the module's text.

    Args:
        services: of the server.
        federation: this server's name in update headers.
        engines: running jobs by id.
        signing_key: finds the key that a client signs with; None: no such client.
    """

    def __init__(
        self,
        services: Services,
        federation: str,
        engines: Mapping[str, JobEngine],
        signing_key: Callable[[str], bytes | None],
    ) -> None:
        self._services = services
        self._federation = federation
        self._engines = engines
        self._signing_key = signing_key
        self._settling: dict[tuple[str, str], asyncio.Task[UploadState]] = {}
        self._reading_header = asyncio.Lock()

    async def state_of(self, client: str, update_id: str) -> UploadState:
        """Say how far an upload is, or what became of it."""
        if recorded := self.recorded(client, update_id):
            return recorded
        for engine in self._engines.values():
            key = None if engine.attempt is None else engine.attempt.spool_of(client, update_id)
            if key is not None:
                # The first look after a restart reads what came before it.
                spool = await self.in_worker(partial(self._services.blobs.spool, key))
                return UploadState(spool.num_bytes)
        return UploadState(0)

    async def announce(self, client: str, header_bytes: bytes, signature: bytes) -> Announced | UploadState:
        """Check an update's header before any of its bytes are taken.

        Returns:
            What `upload` and `send` go on with; or the final, durable answer, if this update was settled before or its
            header does not fit the work that the client was given.

        Raises:
            UpdateRejected: nobody asked this client for such an update; counted and logged, not journaled.
        """
        job = ""
        try:
            check_signature(client, self._signing_key(client), header_bytes, signature)
            header = await self._read_header(client, header_bytes)
            if header.federation != self._federation:
                raise UpdateRejected(UpdateResult.BAD_SIGNATURE, f"signed for federation {header.federation!r}")
            if (settling := self._settling.get((client, header.update_id))) is not None:
                return await asyncio.shield(settling)
            engine = self._engines.get(header.job_id)
            is_awaited = engine is not None and engine.attempt is not None and engine.attempt.awaits(client, header)
            if not is_awaited and (recorded := self.recorded(client, header.update_id)):
                return recorded
            if engine is None:
                late = self._services.store.job(header.job_id) is not None
                reason = UpdateResult.TOO_LATE if late else UpdateResult.UNKNOWN_JOB
                raise UpdateRejected(reason, f"job {header.job_id} is not running")
            job = header.job_id
            attempt = find_attempt(client, header, engine, self._services.store)
        except UpdateRejected as error:
            self.count(job, client, error.reason, str(error))
            raise
        announced = Announced(client, header, header_bytes, signature, engine, attempt)
        self.received(announced, len(header_bytes) + len(signature))
        try:
            check_header(client, header, attempt, engine)
        except UpdateRejected as error:
            return await self.settle(announced, partial(_refuse, error), _at_once)
        return announced

    async def _read_header(self, client: str, data: bytes) -> UpdateHeader:
        """Read a header, a long one only from a client that is to send a layout, and one at a time in a worker."""
        if len(data) <= SHORT_HEADER_BYTES:
            return UpdateHeader.from_bytes(data)
        if not any(
            engine.attempt is not None and engine.attempt.wants_layout(client) for engine in self._engines.values()
        ):
            text = f"header of {len(data)} bytes, at most {SHORT_HEADER_BYTES} unless the first version is asked for"
            raise UpdateRejected(UpdateResult.TOO_LATE, text)
        async with self._reading_header:
            return await self.in_worker(partial(UpdateHeader.from_bytes, data))

    def upload(self, announced: Announced) -> Upload:
        """Begin or resume a frame in chunks."""
        header, spools = announced.header, announced.attempt.spools
        key = header.assignment_id + header.update_id
        for other in [other for other in spools if other != key and other.startswith(header.assignment_id)]:
            self._services.blobs.spool(other).discard()  # one upload for an assignment, or space would have no bound
            del spools[other]
        turn = spools.setdefault(key, asyncio.Lock())
        return Upload(self, announced, self._services.blobs.spool(key), turn)

    async def send(self, client: str, header_bytes: bytes, signature: bytes, frame: bytes) -> UploadState:
        """Take a whole small update at once and say what became of it."""
        try:
            num_bytes = len(header_bytes) + len(frame)
            if num_bytes > MESSAGE_BYTES:
                text = f"header and frame have {num_bytes} bytes, at most {MESSAGE_BYTES} in one message"
                raise UpdateRejected(UpdateResult.WRONG_SIZE, text)
            announced = await self.announce(client, header_bytes, signature)
            if isinstance(announced, UploadState):
                return announced
            self.received(announced, len(frame))
            run: Run = _at_once if self._is_light(announced, frame) else self.in_worker
            return await self.settle(announced, partial(self._put, announced.header, frame), run)
        except UpdateRejected as error:
            return UploadState(0, error.reason, str(error))

    async def settle(self, announced: Announced, keep: Callable[[], Kept], run: Run) -> UploadState:
        """Make an update durable, check it, journal it, fold it; `run` is given each of the steps that take long.

        It goes on to its end in a task of its own: a caller whose connection breaks changes nothing, and one that
        comes again meanwhile waits for the same answer.
        """
        key = announced.client, announced.header.update_id
        task = self._settling.get(key)
        if task is None:
            task = self._settling[key] = asyncio.create_task(self._settle(announced, keep, run))
            task.add_done_callback(lambda _: self._settling.pop(key, None))
        return await asyncio.shield(task)

    async def _settle(self, announced: Announced, keep: Callable[[], Kept], run: Run) -> UploadState:
        header, engine, attempt, client = announced.header, announced.engine, announced.attempt, announced.client
        try:
            with attempt.receiving(header.assignment_id):
                result, text = await self._take(announced, keep, run)
        except UpdateRejected as error:  # the attempt closed meanwhile, or has this client's update already
            self.count(header.job_id, client, error.reason, str(error))
            return UploadState(0, error.reason, str(error))
        except StateError:
            raise  # the server stops
        except Exception as error:
            # The codec or the rule, which may be a third party's, broke: nobody can say what the sum holds now.
            log.exception("update failed", extra={"job": header.job_id, "client": client})
            engine.fail(f"{type(error).__name__} while an update was taken in: {error}")
            raise UpdateRejected(UpdateResult.TOO_LATE, "the job has failed; the server's log says why") from error
        self.count(header.job_id, client, result, text)
        accepted = result is UpdateResult.ACCEPTED
        engine.release(client, header.assignment_id, Accepted(client) if accepted else Dropped(client, Drop.REJECTED))
        return UploadState(header.frame_bytes, result, text)

    async def _take(self, announced: Announced, keep: Callable[[], Kept], run: Run) -> tuple[UpdateResult, str]:
        """Make an update durable, look at it, journal what was found and, if it counts, fold it."""
        attempt = announced.attempt
        kept, result, text = None, UpdateResult.ACCEPTED, ""
        try:
            kept = await run(keep)
            async with attempt.reading:
                await run(partial(self._check, announced, kept))
        except UpdateRejected as error:
            result, text = error.reason, str(error)
        try:
            await self._journal(announced, kept, result, text)
        except UpdateRejected as error:  # another client has used this update id: nothing is recorded
            result, text = error.reason, str(error)
        if result is UpdateResult.ACCEPTED and kept is not None:
            attempt.accept(announced.client, announced.header, kept.digest)
            await self._fold(announced, kept, run)
        return result, text

    async def _journal(self, announced: Announced, kept: Kept | None, result: UpdateResult, text: str) -> None:
        header, attempt = announced.header, announced.attempt
        update = UpdateRecord(
            update_id=header.update_id,
            assignment_id=header.assignment_id,
            job_id=header.job_id,
            version=attempt.version,
            attempt=attempt.record.attempt,
            kind=attempt.kind,
            client=announced.client,
            result=result,
            text=text,
            header=announced.header_bytes,
            signature=announced.signature,
            blob=None if kept is None else kept.digest,
            frame_bytes=header.frame_bytes,
            num_examples=header.num_examples,
            metrics=json.dumps(header.metrics, sort_keys=True),
            received_at=self._services.clock.wall_s(),
        )
        done = replace(attempt.assignments[header.assignment_id], ended="done", text=text)
        small = () if kept is None or kept.record is None else (kept.record,)
        await self._services.journal.write(*small, update, done)

    def _check(self, announced: Announced, kept: Kept) -> None:
        frame = self._services.vault.open(kept)
        check_frame(announced.client, announced.header, announced.attempt, announced.engine, frame)

    async def _fold(self, announced: Announced, kept: Kept, run: Run) -> None:
        attempt, engine = announced.attempt, announced.engine
        if attempt.fold is None or engine.layout is None:
            return
        fold, plan, whole, weight = attempt.fold, engine.plan, engine.layout, engine.plan.weight_of(announced.header)

        def add() -> None:
            frame = self._services.vault.open(kept)
            fold.add(passing(plan.parts(frame, whole, announced.client, attempt.version), frame), weight)

        started_s = time.perf_counter()
        async with attempt.reading:
            await run(add)
        self._services.metrics.folded(engine.job_id, time.perf_counter() - started_s)

    def _is_light(self, announced: Announced, frame: bytes) -> bool:
        """Whether an update is taken in sooner than a worker thread would have heard of it."""
        layout = announced.engine.layout
        is_short = layout is not None and layout.num_values <= LIGHT_VALUES
        return not frame or (len(frame) <= SMALL_BYTES and is_short)

    def _put(self, header: UpdateHeader, frame: bytes) -> Kept:
        if len(frame) != header.frame_bytes:
            text = f"frame of {len(frame)} bytes, announced were {header.frame_bytes}"
            raise UpdateRejected(UpdateResult.WRONG_SIZE, text)
        digest = hashlib.sha256(frame).hexdigest()
        if digest != header.frame_digest:
            text = f"frame {digest[:12]}, announced was {header.frame_digest[:12]}"
            raise UpdateRejected(UpdateResult.WRONG_DIGEST, text)
        return self._services.vault.put(frame, digest)

    def recorded(self, client: str, update_id: str) -> UploadState | None:
        """Return what became of an update, if that is known."""
        record = self._services.store.update(update_id)
        if record is None or record.client != client:
            return None
        return UploadState(record.frame_bytes, record.result, record.text)

    def received(self, announced: Announced, num_bytes: int) -> None:
        """Count bytes of an update that came over the wire, whatever becomes of it."""
        engine, attempt = announced.engine, announced.attempt
        sent = engine.plan.trained(attempt.kind, engine.layout, announced.client, attempt.version)
        engine.traffic.received(attempt, announced.header.assignment_id, num_bytes, sent)

    def count(self, job: str, client: str, result: UpdateResult, text: str) -> None:
        """Count and log what became of an update; `job` is empty where nobody knows it."""
        self._services.metrics.update(job, result)
        level = logging.DEBUG if result is UpdateResult.ACCEPTED else logging.WARNING
        log.log(level, "update", extra={"job": job, "client": client, "result": result.value, "text": text})

    async def in_worker(self, call: Callable[[], T]) -> T:
        """Run `call`, which may use the disk, in a worker thread.

        Raises:
            StateError: the disk failed; the server stops, for what it cannot keep it must not take in.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._services.workers, call)
        except StateError as error:
            self._services.journal.stop(error)
            raise


async def _at_once(call: Callable[[], T]) -> T:
    return call()


def _refuse(error: UpdateRejected) -> Kept:
    raise error
