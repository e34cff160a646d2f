"""The server without a wire: its jobs and the clients that work on them.

The gRPC services and the simulator's in-process transport are two thin doors to this one class. Who calls has been
authenticated before; names given here are true. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

from fedcore.errors import FedError, InvalidInput, NotFound, Refused, StateUnusable, Unreachable
from fedcore.jobfile import Job
from fedcore.messages import CHUNK_BYTES, Answer, Assignment, Cancel, Decline, Heartbeat, Hello, Piece, SmallUpdate
from fedserver.initial.adapter import GivenAdapter, check_adapter
from fedserver.initial.uploads import AdapterUploads
from fedserver.rounds.attempt import split_spool_key
from fedserver.rounds.engine import JobEngine
from fedserver.rounds.fleet import Fleet, Seat
from fedserver.rounds.intake import Intake
from fedserver.rounds.plan import Plan, make_plan
from fedserver.rounds.scheduler import Drop, Dropped
from fedserver.rounds.services import Services
from fedserver.state.records import JobRecord, JobStatus, VersionRecord
from fedserver.state.vault import check_size

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 10.0
SILENCE_S = 3 * HEARTBEAT_INTERVAL_S
MIN_ID_CHARS = 6
MAX_VERSION = 2**63 - 1  # what a store can hold; no job gets so far


class Federation:
    """See the module's text.

    Attributes:
        intake: where updates go.
        adapters: where the weights go that jobs are to start from.
        engines: running jobs by id.
        recovered: set when every unfinished job stands where the journal has it. Nobody may be let in before: an update
            that a job waits for would be told that it is too late.
    """

    def __init__(self, services: Services, federation: str, signing_key: Callable[[str], bytes | None]) -> None:
        self.services = services
        self.federation = federation
        self.engines: dict[str, JobEngine] = {}
        self.recovered = asyncio.Event()
        self.intake = Intake(services, federation, self.engines, signing_key)
        self.adapters = AdapterUploads(services.blobs, self.intake.in_worker)
        self._tasks: asyncio.TaskGroup | None = None
        self._change = asyncio.Event()

    @property
    def fleet(self) -> Fleet:
        """The connected clients."""
        return self.services.fleet

    async def run(self) -> None:
        """Go on with every unfinished job, and take new ones, until cancelled.

        None goes on before all have been recovered: when one of them is damaged, nothing has happened yet.

        Raises:
            ExceptionGroup: an engine or the watch over silent clients failed; the server has to stop.
        """
        self._discard_dead_uploads()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            unfinished = [record for record in self.services.store.jobs() if record.status is JobStatus.RUNNING]
            failed = [record for record in map(self._resume, unfinished) if record is not None]
            for engine in list(self.engines.values()):
                await engine.recovered.wait()
            if failed:
                await self.services.journal.write(*failed)
            self.recovered.set()
            tasks.create_task(self._watch_silence())

    # -- jobs --------------------------------------------------------------------------------------------------------

    async def submit(self, spec: bytes, adapter: GivenAdapter | None = None) -> JobRecord:
        """Journal and start a job, from the values of `adapter` if there is one; its weights are here already.

        Raises:
            JobFileError: it cannot be run by this server.
            InvalidInput: it cannot start from the adapter.
            NotFound: the adapter's weights are not here.
        """
        plan = await self.intake.in_worker(partial(make_plan, Job.from_json(spec), "job"))
        job = plan.job
        if adapter is not None:
            await self.intake.in_worker(partial(self._check_adapter, job, adapter))
        record = JobRecord(
            uuid.uuid4().hex,
            job.job.name,
            job.to_json(),
            JobStatus.RUNNING,
            self.services.clock.wall_s(),
            base_digest=job.job.base_digest,
            adapter_blob=None if adapter is None else adapter.digest,
        )
        await self.services.journal.write(record)
        self._start(record, plan)
        log.info("submitted", extra={"job": record.job_id, "job_name": job.job.name})
        return record

    def _check_adapter(self, job: Job, adapter: GivenAdapter) -> None:
        if adapter.digest not in self.services.blobs:
            raise NotFound(f"the weights of adapter {adapter.digest} are not here: send them first")
        check_adapter(job, adapter.config, self.services.blobs.open(adapter.digest))

    async def stop_job(self, job_id: str) -> JobRecord:
        """End a running job; what it has computed stays.

        Raises:
            NotFound: no such job.
        """
        if (engine := self.engines.get(job_id)) is not None:
            await engine.stop("stopped by an operator")
        return self.job(job_id)

    def job(self, job_id: str) -> JobRecord:
        """Return a job by id or, if only one fits, by name or by the start of its id (6 characters or more).

        Raises:
            NotFound: no such job; the text says which there are.
            InvalidInput: several jobs fit.
        """
        if (engine := self.engines.get(job_id)) is not None:
            return engine.record
        jobs = self.services.store.jobs()
        found = [record for record in jobs if record.job_id == job_id]
        found = found or [record for record in jobs if record.name == job_id]
        if len(job_id) >= MIN_ID_CHARS:
            found = found or [record for record in jobs if record.job_id.startswith(job_id)]
        if not found:
            known = ", ".join(f"{record.name} ({record.job_id[:8]})" for record in jobs[-10:])
            raise NotFound(f"no job {job_id!r}; known: {known or 'none'}")
        if len(found) > 1:
            ids = ", ".join(record.job_id for record in found)
            raise InvalidInput(f"{len(found)} jobs fit {job_id!r}, name one by its id: {ids}")
        return found[0]

    def version(self, job_id: str, version: int | None) -> VersionRecord:
        """Return a version of a job, or its newest.

        Raises:
            NotFound: no such job or version.
        """
        store = self.services.store
        found = store.latest_version(job_id) if version is None else store.version(job_id, min(version, MAX_VERSION))
        if found is None:
            what = "a version yet" if version is None else f"version {version}"
            raise NotFound(f"job {job_id!r} does not have {what}")
        return found

    async def frame(self, job_id: str, version: int, offset: int) -> AsyncIterator[bytes]:
        """Yield a version from `offset` to its end as clients download it, in chunks.

        Raises:
            NotFound: no such job or version.
            InvalidInput: `offset` is beyond the end.
            StateUnusable: its bytes are not all there. If a job's clients were told to download them, the server stops:
                none of them could go on, and in the end the job would fail.
        """
        found = self.version(job_id, version)
        head, body = found.frame_head, found.frame_body
        engine = self.engines.get(job_id)
        orders = None if engine is None or engine.orders.digest != found.frame_digest else engine.orders
        try:
            if orders is not None:
                check_size(body, self.services.vault.size(body), orders.num_bytes - len(head))
            if offset < len(head):
                yield head[offset:]
                self._sent(job_id, len(head) - offset)
            async for chunk in self._chunks(body, max(0, offset - len(head))):
                yield chunk
                self._sent(job_id, len(chunk))
        except StateUnusable as error:
            if orders is not None:
                self.services.journal.stop(error)
            raise

    async def piece(self, job_id: str, version: int, piece: Piece, offset: int) -> AsyncIterator[bytes]:
        """Yield a version's frame, basis or change of the frozen matrices, from byte `offset` to its end, in chunks.

        Raises:
            NotFound: no such job or version, or it has no such thing.
            InvalidInput, StateUnusable: as for `frame`.
        """
        if piece is Piece.FRAME:
            async for chunk in self.frame(job_id, version, offset):
                yield chunk
            return
        found = self.version(job_id, version)
        digest = found.basis_blob if piece is Piece.BASIS else found.change_blob
        if digest is None:
            raise NotFound(f"version {version} of job {job_id!r} has no {piece}")
        async for chunk in self._chunks(digest, offset):
            yield chunk
            self._sent(job_id, len(chunk))

    async def state(self, job_id: str, version: int, offset: int) -> AsyncIterator[bytes]:
        """Yield a version's values, its basis and the changes of what is frozen, the oldest first, from `offset` on.

        Raises like `frame`.
        """
        found, vault, before = self.version(job_id, version), self.services.vault, 0
        parts = [found.state_blob, *([found.basis_blob] if found.basis_blob else []), *vault.changes(found)]
        for number, digest in enumerate(parts, 1):
            num_bytes = vault.size(digest)
            if offset < before + num_bytes or number == len(parts):
                async for chunk in self._chunks(digest, max(0, offset - before)):
                    yield chunk
            before += num_bytes

    async def _chunks(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        vault, loop = self.services.vault, asyncio.get_running_loop()
        num_bytes = vault.size(digest)
        if offset > num_bytes:
            raise InvalidInput(f"offset {offset}, there are {num_bytes} bytes")
        for start in range(offset, num_bytes, CHUNK_BYTES):
            yield await loop.run_in_executor(self.services.workers, vault.read, digest, start, CHUNK_BYTES)

    def _sent(self, job_id: str, num_bytes: int) -> None:
        if (engine := self.engines.get(job_id)) is not None:
            engine.traffic.sent(engine.state.stage, num_bytes)

    # -- clients -----------------------------------------------------------------------------------------------------

    def join(self, client: str, hello: Hello) -> Seat:
        """Seat a connected client."""
        seat = self.fleet.join(client, hello)
        seat.seen_s = self.services.clock.now_s()
        log.info("client joined", extra={"client": client, "software": hello.software, "device": hello.device})
        self._fleet_changed()
        return seat

    async def orders(self, seat: Seat) -> AsyncIterator[Assignment | Cancel | Answer]:
        """Yield what a client is told, until its session ends.

        Raises:
            FedError: why the session was ended.
        """
        async for order in seat.orders():
            yield order
            if isinstance(order, Assignment) and order.frame:
                self._sent(order.job_id, len(order.frame))
            del order  # not held while its client works

    def leave(self, seat: Seat, reason: FedError | None = None) -> None:
        """End a client's session, or hear that it has ended; later calls for the same seat do nothing.

        Who watches hears of it now, not when the client's stream ends: one that does not read holds its stream up.
        """
        if self.fleet.leave(seat, reason):
            log.info("client left", extra={"client": seat.client})
            self._fleet_changed()

    def cut(self, client: str, reason: Refused) -> None:
        """End a client's session, and expect nothing more of the work that it has in hand."""
        for engine in self.engines.values():
            if engine.attempt is not None and (assignment_id := engine.attempt.assignment_of(client)):
                engine.attempt.ended.add(assignment_id)
                engine.post(Dropped(client, Drop.REJECTED))
        if (seat := self.fleet.seats.get(client)) is not None:
            self.leave(seat, reason)

    def close_sessions(self) -> None:
        """End every session in good order; clients come again when somebody answers."""
        for seat in list(self.fleet.seats.values()):
            self.leave(seat)

    async def heard(self, seat: Seat, event: Heartbeat | Decline | SmallUpdate) -> None:
        """Take what a client says in its session."""
        seat.seen_s = self.services.clock.now_s()
        match event:
            case Heartbeat():
                self.fleet.heartbeat(seat, event)
                self._changed()
            case Decline():
                for engine in list(self.engines.values()):
                    await engine.declined(seat.client, event)
            case SmallUpdate():
                seat.seen_s = math.inf  # it is we who let it wait now
                try:
                    state = await self.intake.send(seat.client, event.header, event.signature, event.frame)
                finally:
                    seat.seen_s = self.services.clock.now_s()
                seat.order(Answer(event.number, state))

    async def _watch_silence(self) -> None:
        clock = self.services.clock
        while True:
            await clock.sleep(HEARTBEAT_INTERVAL_S)
            for seat in list(self.fleet.seats.values()):
                if clock.now_s() - seat.seen_s > SILENCE_S:
                    self.leave(seat, Unreachable(f"silent for more than {SILENCE_S:g} s"))

    # -- who watches -------------------------------------------------------------------------------------------------

    def next_change(self) -> asyncio.Event:
        """Return an event that is set with the next change of anything that `status` shows."""
        return self._change

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _fleet_changed(self) -> None:
        self.services.metrics.clients_connected.set(len(self.fleet.seats))
        self._changed()

    def _resume(self, record: JobRecord) -> JobRecord | None:
        """Start the engine of a job from before the restart; one whose plugins are gone has failed: return that."""
        try:
            plan = make_plan(Job.from_json(record.spec), record.name)
        except InvalidInput as error:
            log.error("job failed", extra={"job": record.job_id, "failure": str(error)})
            wall_s = self.services.clock.wall_s()
            return replace(record, status=JobStatus.FAILED, finished_at=wall_s, failure=str(error))
        self._start(record, plan)
        return None

    def _start(self, record: JobRecord, plan: Plan) -> None:
        assert self._tasks is not None, "run() is not running"
        engine = JobEngine(record, plan, self.services, self._changed, self.recovered)
        self.engines[record.job_id] = engine
        task = self._tasks.create_task(engine.run(), name=f"job {record.job_id}")
        task.add_done_callback(lambda _: self._ended(record.job_id))

    def _discard_dead_uploads(self) -> None:
        """Give back the space of unfinished uploads that nobody will go on with."""
        store, blobs = self.services.store, self.services.blobs
        keep: set[str] = set()
        for key in blobs.spools():
            assignment = store.assignment(split_spool_key(key)[0])
            job = None if assignment is None else store.job(assignment.job_id)
            if assignment is not None and not assignment.ended and job is not None and job.status is JobStatus.RUNNING:
                keep.add(key)
        blobs.discard_spools(keep)

    def _ended(self, job_id: str) -> None:
        del self.engines[job_id]
        self._changed()
