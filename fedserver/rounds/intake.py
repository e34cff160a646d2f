"""The way of an update into the server: announce → receive → check → journal → fold → acknowledge.

**Journal first, acknowledge after**: the answer "accepted" leaves this module only when the frame and the record that
names it are durable. A rejection of work that was assigned is durable too, so asking again gives the same answer.

Methods run on the event loop's thread; reading a whole frame (checks, fold) happens in worker threads.
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
from typing import ParamSpec, TypeVar

from fedcore.errors import Refused, StateError, UpdateRejected, UpdateResult
from fedcore.messages import UpdateHeader, UploadState
from fedserver.rounds.admission import check_frame, check_header, check_signature, find_attempt
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.engine import JobEngine
from fedserver.rounds.scheduler import Accepted, Drop, Dropped
from fedserver.rounds.services import Services
from fedserver.state.base import Bytes, Spool, UpdateRecord

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


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

    async def append(self, offset: int, data: Bytes) -> None:
        """Take the next chunk.

        Raises:
            UpdateRejected: WRONG_SIZE, the chunk does not start where the last one ended or goes on after the announced
                end. Nothing was taken; the upload can be resumed.
        """
        end = offset + len(data)
        async with self._turn:
            if offset != self.num_bytes or end > self._announced.header.frame_bytes:
                raise UpdateRejected(
                    UpdateResult.WRONG_SIZE,
                    f"chunk of bytes {offset} to {end}, expected one from {self.num_bytes} to at most"
                    f" {self._announced.header.frame_bytes}",
                )
            self._intake.received(self._announced, len(data))
            await self._intake.in_worker(self._spool.append, data)

    async def finish(self) -> UploadState:
        """Judge the whole update; the answer is durable."""
        header = self._announced.header
        return await self._intake.settle(
            self._announced, lambda: self._spool.seal(header.frame_digest, header.frame_bytes)
        )


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

    async def state_of(self, client: str, update_id: str) -> UploadState:
        """Say how far an upload is, or what became of it."""
        if recorded := self._recorded(client, update_id):
            return recorded
        for engine in self._engines.values():
            key = None if engine.attempt is None else engine.attempt.spool_of(client, update_id)
            if key is not None:
                # The first look after a restart reads what came before it.
                spool = await self.in_worker(self._services.blobs.spool, key)
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
            header = UpdateHeader.from_bytes(header_bytes)
            check_signature(client, self._signing_key(client), header_bytes, signature)
            if header.federation != self._federation:
                raise UpdateRejected(UpdateResult.BAD_SIGNATURE, f"signed for federation {header.federation!r}")
            if recorded := self._recorded(client, header.update_id):
                return recorded
            if (settling := self._settling.get((client, header.update_id))) is not None:
                return await asyncio.shield(settling)
            engine = self._engines.get(header.job_id)
            if engine is None:
                late = self._services.store.job(header.job_id) is not None
                reason = UpdateResult.TOO_LATE if late else UpdateResult.UNKNOWN_JOB
                raise UpdateRejected(reason, f"job {header.job_id} is not running")
            job = header.job_id
            attempt = find_attempt(client, header, engine, self._services.store)
        except UpdateRejected as error:
            self._count(job, client, error.reason, str(error))
            raise
        announced = Announced(client, header, header_bytes, signature, engine, attempt)
        self.received(announced, len(header_bytes) + len(signature))
        try:
            check_header(header, attempt, engine)
        except UpdateRejected as error:
            return await self.settle(announced, partial(_refuse, error))
        return announced

    def upload(self, announced: Announced) -> Upload:
        """Begin or resume a frame in chunks."""
        header, spools = announced.header, announced.attempt.spools
        key = header.assignment_id + header.update_id
        for other in [other for other in spools if other != key and other.startswith(header.assignment_id)]:
            self._services.blobs.spool(other).discard()  # one upload for an assignment, or space would have no bound
            del spools[other]
        turn = spools.setdefault(key, asyncio.Lock())
        return Upload(self, announced, self._services.blobs.spool(key), turn)

    async def send(self, announced: Announced, frame: bytes) -> UploadState:
        """Take a whole frame at once; the answer is durable."""
        self.received(announced, len(frame))
        return await self.settle(announced, lambda: self._put(announced.header, frame))

    async def settle(self, announced: Announced, store_frame: Callable[[], str]) -> UploadState:
        """Make an update durable, check it, journal it, fold it.

        It goes on to its end in a task of its own: a caller whose connection breaks changes nothing, and one that
        comes again meanwhile waits for the same answer.
        """
        key = announced.client, announced.header.update_id
        task = self._settling.get(key)
        if task is None:
            task = self._settling[key] = asyncio.create_task(self._settle(announced, store_frame))
            task.add_done_callback(lambda _: self._settling.pop(key, None))
        return await asyncio.shield(task)

    async def _settle(self, announced: Announced, store_frame: Callable[[], str]) -> UploadState:
        header, engine, attempt, client = announced.header, announced.engine, announced.attempt, announced.client
        try:
            with attempt.receiving(header.assignment_id):
                result, text = await self._take(announced, store_frame)
        except UpdateRejected as error:  # the attempt closed meanwhile, or has this client's update already
            self._count(header.job_id, client, error.reason, str(error))
            return UploadState(0, error.reason, str(error))
        except StateError:
            raise  # the server stops
        except Exception as error:
            # The codec or the rule, which may be a third party's, broke: nobody can say what the sum holds now.
            log.exception("update failed", extra={"job": header.job_id, "client": client})
            engine.fail(f"{type(error).__name__} while an update was taken in: {error}")
            raise Refused("the job has failed; the server's log says why") from error
        self._count(header.job_id, client, result, text)
        accepted = result is UpdateResult.ACCEPTED
        engine.release(client, header.assignment_id, Accepted(client) if accepted else Dropped(client, Drop.REJECTED))
        return UploadState(header.frame_bytes, result, text)

    async def _take(self, announced: Announced, store_frame: Callable[[], str]) -> tuple[UpdateResult, str]:
        """Make an update durable, look at it, journal what was found and, if it counts, fold it."""
        attempt = announced.attempt
        blob, result, text = None, UpdateResult.ACCEPTED, ""
        try:
            blob = await self.in_worker(store_frame)
            async with attempt.reading:
                await self.in_worker(self._check, announced, blob)
        except UpdateRejected as error:
            result, text = error.reason, str(error)
        try:
            await self._journal(announced, blob, result, text)
        except UpdateRejected as error:  # another client has used this update id: nothing is recorded
            result, text = error.reason, str(error)
        if result is UpdateResult.ACCEPTED:
            attempt.accept(announced.client, announced.header, blob)
            await self._fold(announced, blob)
        return result, text

    async def _journal(self, announced: Announced, blob: str | None, result: UpdateResult, text: str) -> None:
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
            blob=blob,
            frame_bytes=header.frame_bytes,
            num_examples=header.num_examples,
            metrics=json.dumps(header.metrics, sort_keys=True),
            received_at=self._services.clock.wall_s(),
        )
        done = replace(attempt.assignments[header.assignment_id], ended="done", text=text)
        await self._services.journal.write(update, done)

    def _check(self, announced: Announced, blob: str) -> None:
        frame = self._services.blobs.open(blob)
        check_frame(announced.header, announced.attempt, announced.engine, frame)

    async def _fold(self, announced: Announced, blob: str | None) -> None:
        attempt, engine = announced.attempt, announced.engine
        if attempt.fold is None or blob is None or engine.layout is None:
            return
        fold, num_values, weight = attempt.fold, engine.layout.num_values, engine.plan.weight_of(announced.header)

        def add() -> None:
            fold.add(engine.plan.uplink.blocks(self._services.blobs.open(blob), num_values), weight)

        started_s = time.perf_counter()
        async with attempt.reading:
            await self.in_worker(add)
        self._services.metrics.fold_seconds.labels(engine.job_id).observe(time.perf_counter() - started_s)

    def _put(self, header: UpdateHeader, frame: bytes) -> str:
        if len(frame) != header.frame_bytes:
            raise UpdateRejected(
                UpdateResult.WRONG_SIZE, f"frame of {len(frame)} bytes, announced were {header.frame_bytes}"
            )
        digest = hashlib.sha256(frame).hexdigest()
        if digest != header.frame_digest:
            raise UpdateRejected(
                UpdateResult.WRONG_DIGEST, f"frame {digest[:12]}, announced was {header.frame_digest[:12]}"
            )
        return self._services.blobs.put(frame)

    def _recorded(self, client: str, update_id: str) -> UploadState | None:
        record = self._services.store.update(update_id)
        if record is None or record.client != client:
            return None
        return UploadState(record.frame_bytes, record.result, record.text)

    def received(self, announced: Announced, num_bytes: int) -> None:
        """Count bytes of an update that came over the wire, whatever becomes of it."""
        announced.engine.uplink_bytes += num_bytes
        self._services.metrics.transferred(announced.engine.job_id, "uplink", announced.attempt.kind.value, num_bytes)

    def _count(self, job: str, client: str, result: UpdateResult, text: str) -> None:
        self._services.metrics.update(job, result)
        level = logging.DEBUG if result is UpdateResult.ACCEPTED else logging.WARNING
        log.log(level, "update", extra={"job": job, "client": client, "result": result.value, "text": text})

    async def in_worker(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call`, which may use the disk, in a worker thread.

        Raises:
            StateError: the disk failed; the server stops, for what it cannot keep it must not take in.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._services.workers, lambda: call(*args, **kwargs))
        except StateError as error:
            self._services.journal.stop(error)
            raise


def _refuse(error: UpdateRejected) -> str:
    raise error
