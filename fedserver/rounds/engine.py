"""One job's engine: feeds the scheduler with events and carries its commands out.

An actor: events wait in a queue and one task takes them one by one, so that nothing here needs a lock. What takes long
(decoding, folding, writing a version) runs in worker threads; the event loop is never blocked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from fedcore.jobfile import Job
from fedcore.layout import Layout
from fedcore.messages import Assignment, Hello, WorkKind
from fedcore.rng import derive_seed
from fedserver.rounds import scheduler as sched
from fedserver.rounds.admission import layout_of
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.closing import WrittenVersion, first_version, next_version
from fedserver.rounds.figures import evaluation_of
from fedserver.rounds.plan import INITIAL, Plan
from fedserver.rounds.recovery import recover
from fedserver.rounds.scheduler import Phase, Scheduler
from fedserver.rounds.services import Services
from fedserver.state.base import (
    AssignmentRecord,
    AttemptRecord,
    JobRecord,
    JobStatus,
    Record,
    VersionRecord,
)

log = logging.getLogger(__name__)


class JobEngine:
    """See the module's text. `run` is the task; every other method is called on the event loop's thread.

    Attributes:
        record: the job as the journal has it.
        attempt: what is open or closing; None while waiting for clients and after the end.
        latest: the newest version; None before version 0.
        evaluated: the newest version whose evaluation is known.
        recovered: set when all of this is as the journal has it, or cannot be.
    """

    def __init__(self, record: JobRecord, plan: Plan, services: Services, changed: Callable[[], None]) -> None:
        self.record = record
        self.plan = plan
        self.attempt: Attempt | None = None
        self.layout: Layout | None = Layout.from_json(record.layout) if record.layout else None
        self.latest: VersionRecord | None = None
        self.evaluated: VersionRecord | None = None
        self.recovered = asyncio.Event()
        self.uplink_bytes = self.downlink_bytes = 0  # since the last version
        self.total_bytes = (0, 0)  # uplink and downlink up to the last version
        self._services = services
        self._changed = changed
        self._events: asyncio.Queue[tuple[sched.Event, AbstractContextManager[None]]] = asyncio.Queue()
        self._alarm: asyncio.Task[None] | None = None
        self._scheduler = Scheduler.start(self.job.schedule, self.job.job.rounds, self.job.job.seed, self._now_s())

    @property
    def job(self) -> Job:
        """The job file."""
        return self.plan.job

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.record.job_id

    @property
    def state(self) -> Scheduler:
        """The scheduler, to be read only."""
        return self._scheduler

    # -- what the fleet says (see `fleet.Listener`) ------------------------------------------------------------------

    def fits(self, hello: Hello) -> bool:
        """Whether a client has the task, adapter and codecs of this job."""
        stages = (*self.job.compression.uplink, *self.job.compression.downlink)
        return (
            self.job.task.name in hello.tasks
            and self.job.adapter.name in hello.adapters
            and all(stage.codec in hello.codecs for stage in stages)
        )

    def idle(self, client: str) -> None:
        """See `fleet.Listener`."""
        self.post(sched.Available(client))

    def busy(self, client: str, gone: bool) -> None:
        """See `fleet.Listener`."""
        self.post(sched.Unavailable(client, gone))

    def returned(self, client: str) -> Assignment | None:
        """See `fleet.Listener`."""
        if self.attempt is None or self._scheduler.phase is not Phase.OPEN:
            return None
        assignment_id = self.attempt.assignment_of(client)
        return None if assignment_id is None else self._assignment(self.attempt, assignment_id, client)

    def post(self, event: sched.Event) -> None:
        """Hand an event to the engine. Virtual time stands still until it has been dealt with."""
        working = self._services.clock.working()
        working.__enter__()
        self._events.put_nowait((event, working))

    # -- the task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Go on until the job has ended.

        Raises:
            FedError: the journal or the disk failed; the server has to stop.
        """
        try:
            await self._recover()
        finally:
            self.recovered.set()
        metrics = self._services.metrics
        version = 0 if self.latest is None else self.latest.version
        metrics.start_job(self.job_id, rounds=self.job.job.rounds, version=version)
        self._services.fleet.add_job(self)
        try:
            self.post(sched.Tick())
            while self.record.status is JobStatus.RUNNING:
                self._set_alarm()
                event, working = await self._events.get()
                try:
                    await self._handle(event)
                finally:
                    working.__exit__(None, None, None)
        finally:
            self._services.fleet.remove_job(self)
            if self._alarm is not None:
                self._alarm.cancel()
            while not self._events.empty():
                self._events.get_nowait()[1].__exit__(None, None, None)

    async def stop(self, status: JobStatus, failure: str) -> None:
        """End the job before its time."""
        if self.attempt is not None:
            clients = tuple(record.client for record in self.attempt.assignments.values())
            await self._services.journal.write(*await self._retire(clients, f"the job was {status.value}"))
        await self._end(status, failure)
        self.post(sched.Tick())  # wakes `run`, which sees the status

    async def _handle(self, event: sched.Event) -> None:
        before = self._scheduler.phase, self._scheduler.stage
        commands = self._scheduler.step(event, self._now_s())
        while commands:
            command = commands.pop(0)
            match command:
                case sched.Assign(clients):
                    commands += await self._assign(clients)
                case sched.Close(unfinished):
                    await self._close(unfinished)
                    # After what is in the queue: the clients that this round has freed are among the next candidates.
                    self.post(sched.Written())
                case sched.Abandon():
                    await self._abandon(command)
                case sched.Finish():
                    await self._end(JobStatus.FINISHED, "")
        self._show(entered=(self._scheduler.phase, self._scheduler.stage) != before)

    async def _assign(self, clients: tuple[str, ...]) -> list[sched.Command]:
        wanted = {uuid.uuid4().hex: client for client in clients}
        taken = {key: client for key, client in wanted.items() if self._services.fleet.take(client, key)}
        if len(taken) < len(wanted):
            for assignment_id, client in taken.items():
                self._services.fleet.release(client, assignment_id)
            missing = sorted(set(clients) - set(taken.values()))
            return self._scheduler.step(sched.Taken(tuple(missing)), self._now_s())
        attempt = self._open_attempt()
        wall_s = self._services.clock.wall_s()
        place = (self.job_id, attempt.version, attempt.number, attempt.kind)
        for assignment_id, client in taken.items():
            attempt.assignments[assignment_id] = AssignmentRecord(assignment_id, *place, client, wall_s)
        self.attempt = attempt
        opened = AttemptRecord(*place, opened_at=wall_s, deadline_at=wall_s + self.job.schedule.deadline_s)
        await self._services.journal.write(opened, *attempt.assignments.values())
        for assignment_id, client in taken.items():
            self._services.fleet.order(client, self._assignment(attempt, assignment_id, client))
        self._log("assigned", attempt, clients=len(taken))
        return []

    async def _close(self, unfinished: tuple[str, ...]) -> None:
        attempt = self.attempt
        if attempt is None:  # an evaluation that nobody came for
            return
        records: list[Record] = await self._retire(unfinished, "the version has closed")
        figures = evaluation_of(attempt.headers.values())
        if figures and self.latest is not None:
            self.latest = self.evaluated = replace(self.latest, metrics=json.dumps(figures, sort_keys=True))
            self._services.metrics.evaluated(self.job_id, version=self.latest.version, figures=figures)
        if attempt.kind is WorkKind.EVALUATE and self.latest is not None:
            self.latest = replace(
                self.latest,
                uplink_bytes=self.latest.uplink_bytes + self.uplink_bytes,
                downlink_bytes=self.latest.downlink_bytes + self.downlink_bytes,
            )
        if self.latest is not None:
            records.append(self.latest)
        if attempt.kind is not WorkKind.EVALUATE:
            written = await asyncio.get_running_loop().run_in_executor(
                self._services.workers, self._write_version, attempt
            )
            self.latest = self._version_record(attempt, written)
            records += [self.record, self.latest]
            self._services.metrics.round_closed(
                self.job_id, version=self.latest.version, seconds=self._now_s() - attempt.opened_s
            )
        self.total_bytes = (self.total_bytes[0] + self.uplink_bytes, self.total_bytes[1] + self.downlink_bytes)
        self.uplink_bytes = self.downlink_bytes = 0
        records.append(self._ended(attempt, "closed", ""))
        await self._services.journal.write(*records)
        self.attempt = None
        self._log("closed", attempt, updates=len(attempt.headers), **figures)

    def _write_version(self, attempt: Attempt) -> WrittenVersion:
        """Compute and write the version that an attempt leads to; runs in a worker thread."""
        blobs, seed, downlink = self._services.blobs, self.job.job.seed, self.plan.downlink
        if attempt.kind is WorkKind.INITIALISE:
            ((client, header),) = attempt.headers.items()
            self.layout = layout_of(header)
            self.record = replace(self.record, layout=self.layout.to_json())
            frame = blobs.open(attempt.frames[client])
            return first_version(blobs, INITIAL.decode(frame, self.layout.num_values), downlink, seed)
        assert self.latest is not None
        assert attempt.fold is not None
        return next_version(
            blobs,
            self.latest.state_blob,
            self.latest.optimizer_blob,
            attempt.fold,
            self.plan.optimizer,
            downlink,
            version=attempt.version + 1,
            seed=seed,
        )

    async def _abandon(self, command: sched.Abandon) -> None:
        attempt = self.attempt or replace(self._open_attempt(), number=command.attempt)
        records: list[Record] = await self._retire(command.unfinished, command.reason)
        await self._services.journal.write(*records, self._ended(attempt, "abandoned", command.reason))
        self.attempt = None
        self._services.metrics.round_abandoned(self.job_id)
        self._log("abandoned", attempt, reason=command.reason)
        if command.final:
            await self._end(JobStatus.FAILED, f"gave up after {self._scheduler.abandoned} attempts: {command.reason}")

    async def _retire(self, clients: tuple[str, ...], reason: str) -> list[Record]:
        """Let nothing more into the attempt and free who still works on it; return what is to be journaled of that."""
        if self.attempt is None:
            return []
        await self.attempt.seal()
        records: list[Record] = []
        for client in clients:
            if assignment_id := self.attempt.assignment_of(client):
                self.attempt.ended.add(assignment_id)
                records.append(replace(self.attempt.assignments[assignment_id], ended="expired", text=reason))
                self._services.fleet.release(client, assignment_id, reason)
        for key in self.attempt.spools:
            self._services.blobs.spool(key).discard()
        return records

    async def _end(self, status: JobStatus, failure: str) -> None:
        finished_at = self._services.clock.wall_s()
        self.record = replace(self.record, status=status, finished_at=finished_at, failure=failure)
        await self._services.journal.write(self.record)
        self._services.metrics.phase(self.job_id, "finished" if status is JobStatus.FINISHED else "failed")
        self._services.metrics.waiting(self.job_id, clients=0, updates=0)
        log.info("job ended", extra={"job": self.job_id, "status": status, "failure": failure})
        self._changed()

    # -- what intake says --------------------------------------------------------------------------------------------

    async def declined(self, client: str, assignment_id: str, reason: str) -> None:
        """A client will not do the work that it was given; work of another job is none of ours."""
        attempt = self.attempt
        expected = None if attempt is None else attempt.assignments.get(assignment_id)
        if attempt is None or expected is None or expected.client != client or assignment_id in attempt.ended:
            return
        attempt.ended.add(assignment_id)
        await self._services.journal.write(replace(expected, ended="declined", text=reason))
        log.warning("declined", extra={"job": self.job_id, "client": client, "reason": reason})
        self.release(client, assignment_id, sched.Dropped(client, refuses=True))

    def release(self, client: str, assignment_id: str, event: sched.Event) -> None:
        """An assignment's outcome is durable: tell the scheduler, and free the client."""
        self.post(event)
        self._services.fleet.release(client, assignment_id)

    # -- small parts -------------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._services.clock.now_s()

    def _open_attempt(self) -> Attempt:
        state = self._scheduler
        fold = None
        if state.stage is WorkKind.TRAIN and self.layout is not None:
            fold = self.plan.open_fold(self.layout.num_values)
        return Attempt(state.stage, state.version, state.attempt, self._now_s(), fold)

    def _assignment(self, attempt: Attempt, assignment_id: str, client: str) -> Assignment:
        latest = self.latest
        return Assignment(
            assignment_id=assignment_id,
            job_id=self.job_id,
            job=self.record.spec,
            version=attempt.version,
            kind=attempt.kind,
            seed=derive_seed(self.job.job.seed, attempt.kind.value, client, attempt.version),
            layout_digest=self.layout.digest if self.layout else "",
            frame_digest=latest.frame_blob if latest else "",
            frame_bytes=self._services.blobs.size(latest.frame_blob) if latest else 0,
            deadline_s=max(0.0, self._scheduler.deadline_s - self._now_s()),
        )

    def _version_record(self, attempt: Attempt, written: WrittenVersion) -> VersionRecord:
        return VersionRecord(
            job_id=self.job_id,
            version=0 if attempt.kind is WorkKind.INITIALISE else attempt.version + 1,
            state_blob=written.state_blob,
            frame_blob=written.frame_blob,
            optimizer_blob=written.optimizer_blob,
            num_updates=len(attempt.headers),
            num_examples=sum(header.num_examples for header in attempt.headers.values()),
            uplink_bytes=self.uplink_bytes,
            downlink_bytes=self.downlink_bytes,
            created_at=self._services.clock.wall_s(),
        )

    def _ended(self, attempt: Attempt, outcome: str, reason: str) -> AttemptRecord:
        wall_s, elapsed_s = self._services.clock.wall_s(), self._now_s() - attempt.opened_s
        opened_at = wall_s - elapsed_s
        return AttemptRecord(
            self.job_id,
            attempt.version,
            attempt.number,
            attempt.kind,
            opened_at=opened_at,
            deadline_at=opened_at + self.job.schedule.deadline_s,
            closed_at=wall_s,
            outcome=outcome,
            reason=reason,
        )

    async def _recover(self) -> None:
        """Go on from the journal: the newest version, and the attempt that was open when the process ended."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._services.workers, recover, self.record, self.plan, self.layout, self._services
        )
        self.latest, self._scheduler, self.attempt, self.total_bytes = found

    def _set_alarm(self) -> None:
        """Wake the scheduler at its deadline."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if self._scheduler.phase in (Phase.WAITING, Phase.OPEN):
            self._alarm = asyncio.create_task(self._ring(self._scheduler.deadline_s - self._now_s()))

    async def _ring(self, delay_s: float) -> None:
        await self._services.clock.sleep(max(0.0, delay_s))
        self.post(sched.Tick())

    def _show(self, *, entered: bool) -> None:
        """Bring metrics up to date, and tell who watches."""
        metrics, state, waiting = self._services.metrics, self._scheduler, self._scheduler.waiting_for()
        if entered:
            metrics.phase(self.job_id, state.stage.value if state.phase is Phase.OPEN else state.phase.value)
        missing = {waiting.kind: waiting.missing}
        metrics.waiting(self.job_id, clients=missing.get("clients", 0), updates=missing.get("updates", 0))
        self._changed()

    def _log(self, event: str, attempt: Attempt, **fields: object) -> None:
        where = {"job": self.job_id, "kind": attempt.kind.value, "version": attempt.version, "attempt": attempt.number}
        log.info(event, extra={**where, **fields})
