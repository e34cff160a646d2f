"""One job's engine: feeds the scheduler with events and carries its commands out.

An actor: events wait in a queue and one task takes them one by one, so that nothing here needs a lock. What takes long
(decoding, folding, writing a version) runs in worker threads; the event loop is never blocked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial

from fedagg.base import Fold
from fedcore.errors import JobFailed, StateError
from fedcore.jobfile import Job
from fedcore.layout import Layout
from fedcore.messages import Assignment, Decline, Hello, WorkKind
from fedserver.rounds import scheduler as sched
from fedserver.rounds.alarm import Alarm
from fedserver.rounds.attempt import Attempt, Decliner
from fedserver.rounds.books import Books
from fedserver.rounds.closing import write_version
from fedserver.rounds.counted import Counted
from fedserver.rounds.figures import evaluation_of
from fedserver.rounds.orders import Orders
from fedserver.rounds.plan import Plan
from fedserver.rounds.privacy import cohort_seed
from fedserver.rounds.recovery import recover
from fedserver.rounds.reports import Reports
from fedserver.rounds.scheduler import Phase, Scheduler
from fedserver.rounds.services import Services
from fedserver.rounds.traffic import Traffic
from fedserver.state.records import AssignmentRecord, AttemptRecord, JobRecord, JobStatus, Record, VersionRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stop:
    """An event of the engine's own: end the job before its time."""

    status: JobStatus
    failure: str


class JobEngine:
    """See the module's text. `run` is the task; every other method is called on the event loop's thread.

    Attributes:
        record: the job as the journal has it.
        attempt: what is open or closing; None while waiting for clients and after the end.
        latest: the newest version; None before version 0.
        evaluated: the newest version whose evaluation is known.
        orders: what clients were told, to be read only.
        traffic: bytes that have crossed the wire.
        books: what a private job has spent.
        last_decline: which client has declined last since the server's start, and why.
        recovered: set when all of this is as the journal has it, or the job has failed.
        ended: set when `run` has ended.
    """

    def __init__(
        self, record: JobRecord, plan: Plan, services: Services, changed: Callable[[], None], may_go_on: asyncio.Event
    ) -> None:
        self.record = record
        self.plan = plan
        self.attempt: Attempt | None = None
        self.layout: Layout | None = Layout.from_json(record.layout) if record.layout else None
        self.latest: VersionRecord | None = None
        self.evaluated: VersionRecord | None = None
        self.last_decline: Decliner | None = None
        self.recovered = asyncio.Event()
        self.ended = asyncio.Event()
        self.traffic = Traffic(record.job_id, services.metrics)
        self.books = Books(None, services, plan)
        self._reports = Reports(record.job_id, services.metrics)
        self._services = services
        self._changed = changed
        self._may_go_on = may_go_on
        self._ends_early = ""
        self._spare: Fold | None = None  # empty, and of the job's size
        self.orders = Orders(record.job_id, record.spec, plan.job.job.seed, services.vault, Counted(plan.job))
        self._events: asyncio.Queue[tuple[sched.Event | _Stop, AbstractContextManager[None]]] = asyncio.Queue()
        self._alarm = Alarm(services.clock, lambda: self.post(sched.Tick()))
        self._scheduler = Scheduler.start(
            self.job.schedule,
            self.job.job.rounds,
            cohort_seed(self.job),
            self._now_s(),
            from_gradient=plan.start is not None,
        )

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
        is_known = self.job.task.name in hello.tasks and self.job.adapter.name in hello.adapters
        return is_known and self.plan.codecs <= set(hello.codecs)

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

    def post(self, event: sched.Event | _Stop) -> None:
        """Hand an event to the engine. Virtual time stands still until it has been dealt with."""
        working = self._services.clock.working()
        working.__enter__()
        self._events.put_nowait((event, working))

    def fail(self, failure: str) -> None:
        """End the job because a part of it broke."""
        if not self.ended.is_set():
            self.post(_Stop(JobStatus.FAILED, failure))

    async def stop(self, failure: str) -> None:
        """End the job because an operator wants it, and return when it has ended."""
        if not self.ended.is_set():
            self.post(_Stop(JobStatus.STOPPED, failure))
            await self.ended.wait()

    # -- the task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover, wait for `may_go_on`, and go on until the job has ended.

        Raises:
            FedError: the journal or the disk failed; the server has to stop.
        """
        with self._services.clock.working():
            await self._guard(self._recover())
        self.recovered.set()
        await self._may_go_on.wait()
        metrics = self._services.metrics
        version = 0 if self.latest is None else self.latest.version
        metrics.start_job(self.job_id, rounds=self.job.job.rounds, version=version)
        self._services.fleet.add_job(self)
        try:
            self.post(sched.Tick())
            while self.record.status is JobStatus.RUNNING:
                state = self._scheduler
                self._alarm.set(state.deadline_s if state.phase in (Phase.WAITING, Phase.OPEN) else None)
                event, working = await self._events.get()
                try:
                    await self._guard(self._handle(event))
                finally:
                    working.__exit__(None, None, None)
        finally:
            self._services.fleet.remove_job(self)
            self._alarm.set(None)
            while not self._events.empty():
                self._events.get_nowait()[1].__exit__(None, None, None)
            self.ended.set()

    async def _guard(self, work: Awaitable[None]) -> None:
        """Let what a plugin does wrong end this job, not the server."""
        try:
            await work
        except StateError:
            raise
        except JobFailed as error:
            await self._stop(_Stop(JobStatus.FAILED, str(error)))
        except Exception as error:
            log.exception("job failed", extra={"job": self.job_id})
            await self._stop(_Stop(JobStatus.FAILED, f"internal error: {type(error).__name__}: {error}"))

    async def _handle(self, event: sched.Event | _Stop) -> None:
        if isinstance(event, _Stop):
            await self._stop(event)
            return
        if isinstance(event, sched.Tick) and self.attempt is not None and self.attempt.is_receiving:
            # What is on its way when the deadline comes was in time: hear of it before deciding.
            await self.attempt.settled()
            self.post(event)
            return
        before = self._scheduler.phase, self._scheduler.stage
        commands = self._scheduler.step(event, self._now_s())
        while commands:
            command = commands.pop(0)
            match command:
                case sched.Assign():
                    commands += await self._assign(command)
                case sched.Close():
                    await self._close()
                    # After what is in the queue: the clients that this round has freed are among the next candidates.
                    self.post(sched.Written())
                case sched.Abandon():
                    await self._abandon(command)
                case sched.Finish():
                    await self._end(JobStatus.FINISHED, self._ends_early)
        entered = (self._scheduler.phase, self._scheduler.stage) != before
        if entered or self._events.empty():  # of a burst, the last event shows where it led
            self._reports.state(self._scheduler, entered=entered)
            self._changed()

    async def _stop(self, stop: _Stop) -> None:
        """End the job before its time."""
        records = await self._retire(f"the job has {stop.status.value}")
        if self.attempt is not None:
            await self.books.release(self.attempt, self.layout, records, in_version=False)
        await self._services.journal.write(*records)
        self.attempt = None
        await self._end(stop.status, stop.failure)

    async def _assign(self, command: sched.Assign) -> list[sched.Command]:
        clients = command.clients
        if excess := await self.books.excess(self._scheduler.stage, self.layout, command):
            self._ends_early = excess
            return self._scheduler.end_here(self._now_s())
        attempt = self._open_attempt(command.available)
        wanted = {uuid.uuid4().hex: client for client in clients}
        taken = {key: client for key, client in wanted.items() if self._services.fleet.take(client, key)}
        if len(taken) < len(wanted):
            self._spare = attempt.fold
            for assignment_id, client in taken.items():
                self._services.fleet.release(client, assignment_id)
            missing = sorted(set(clients) - set(taken.values()))
            return self._scheduler.step(sched.Taken(tuple(missing)), self._now_s())
        record = attempt.record
        place = (self.job_id, record.version, record.attempt, record.kind)
        for assignment_id, client in taken.items():
            attempt.assignments[assignment_id] = AssignmentRecord(assignment_id, *place, client, record.opened_at)
        self.attempt = attempt
        await self._services.journal.write(record, *attempt.assignments.values())
        for assignment_id, client in taken.items():
            self._services.fleet.order(client, self._assignment(attempt, assignment_id, client))
        self._reports.event("assigned", attempt, clients=len(taken))
        return []

    async def _close(self) -> None:
        attempt = self.attempt
        if attempt is None:  # an evaluation that nobody came for
            return
        records = await self._retire("the version has closed")
        await self.books.release(attempt, self.layout, records, in_version=True)
        figures = evaluation_of(attempt.headers.values())
        if self.latest is not None:
            records.append(self._measured(self.latest, attempt, figures))
        if attempt.kind is not WorkKind.EVALUATE:
            given = self.layout, self.latest, self.record.adapter_blob
            written = await self._services.in_worker(
                partial(write_version, self._services.vault, self.plan, attempt, *given)
            )
            self._spare = attempt.fold
            self.layout, self.record = written.layout, written.job(self.record)
            self.record = await self.books.add_up(self.layout, written.number, self.record)
            made = self.traffic.recent, self._services.clock.wall_s(), self.books.epsilon
            self.latest = written.record(attempt, *made)
            records += [*written.small, self.record, self.latest]
            self._services.metrics.round_closed(
                self.job_id,
                version=self.latest.version,
                seconds=self._now_s() - attempt.opened_s,
                encoding_error=self.latest.encoding_error,
            )
        self.traffic.close()
        records.append(self._over(attempt, "closed"))
        await self._services.journal.write(*records)
        if attempt.kind is WorkKind.TRAIN:
            self.orders.counted.add(attempt.version + 1, attempt.headers)
        self.attempt = None
        self._reports.event("closed", attempt, updates=len(attempt.headers), **figures)

    def _measured(self, latest: VersionRecord, attempt: Attempt, figures: dict[str, float]) -> VersionRecord:
        """Add what an attempt has measured of the newest version, and what measuring alone has cost, to its record."""
        if figures:
            latest = self.evaluated = replace(latest, metrics=json.dumps(figures, sort_keys=True))
            self._services.metrics.evaluated(self.job_id, version=latest.version, figures=figures)
        if attempt.kind is WorkKind.EVALUATE:
            latest = replace(latest, **asdict(self.traffic.recent + latest))
        self.latest = latest
        return latest

    async def _abandon(self, command: sched.Abandon) -> None:
        attempt = self.attempt
        if attempt is None:  # it never got its clients
            attempt = self._open_attempt()
            attempt.record = replace(attempt.record, attempt=command.attempt)
        records = await self._retire(command.reason)
        await self.books.release(attempt, self.layout, records, in_version=False)
        self.record = await self._added_up()
        await self._services.journal.write(*records, self._over(attempt, "abandoned", command.reason))
        self.attempt = None
        self._services.metrics.round_abandoned(self.job_id)
        self._reports.event("abandoned", attempt, reason=command.reason)
        if command.final:
            text = f"gave up after {self._scheduler.abandoned} attempts: {command.reason}"
            decline = "" if (last := self.last_decline) is None else f"; {last.client} declined: {last.reason}"
            await self._end(JobStatus.FAILED, text + decline)

    async def _retire(self, reason: str) -> list[Record]:
        """Let nothing more into the attempt and free who still works on it; return what is to be journaled of that."""
        if self.attempt is None:
            return []
        await self.attempt.seal()
        records: list[Record] = []
        for assignment_id, record in self.attempt.assignments.items():
            if assignment_id not in self.attempt.ended:
                self.attempt.ended.add(assignment_id)
                records.append(replace(record, ended="expired", text=reason))
            self._services.fleet.release(record.client, assignment_id, reason)
        for key in self.attempt.spools:
            self._services.blobs.spool(key).discard()
        return records

    async def _end(self, status: JobStatus, failure: str) -> None:
        finished_at = self._services.clock.wall_s()
        added_up = await self.books.add_up(self.layout, self.job.job.rounds, self.record)  # no round is left
        self.record = replace(added_up, status=status, finished_at=finished_at, failure=failure)
        await self._services.journal.write(self.record)
        self._reports.ended(status, failure)
        self._changed()

    # -- what intake says --------------------------------------------------------------------------------------------

    async def declined(self, client: str, decline: Decline) -> None:
        """A client will not do the work that it was given; work of another job is none of ours."""
        attempt, assignment_id, reason = self.attempt, decline.assignment_id, decline.reason[:500]
        expected = None if attempt is None else attempt.assignments.get(assignment_id)
        if attempt is None or expected is None or expected.client != client or assignment_id in attempt.ended:
            return
        attempt.ended.add(assignment_id)
        self.last_decline = Decliner(client, reason)
        log.warning("declined", extra={"job": self.job_id, "client": client, "reason": reason})
        try:
            await self._services.journal.write(replace(expected, ended="declined", text=reason))
        finally:  # also when the connection breaks meanwhile: nobody would wait for this client's answer in vain
            drop = sched.Drop.PASSES if decline.transient else sched.Drop.REFUSES
            self.release(client, assignment_id, sched.Dropped(client, drop))

    def release(self, client: str, assignment_id: str, event: sched.Event) -> None:
        """An assignment's outcome is durable: tell the scheduler, and free the client."""
        self.post(event)
        self._services.fleet.release(client, assignment_id)

    # -- small parts -------------------------------------------------------------------------------------------------

    async def _added_up(self) -> JobRecord:
        return await self.books.add_up(self.layout, 0 if self.latest is None else self.latest.version, self.record)

    def _now_s(self) -> float:
        return self._services.clock.now_s()

    def _open_attempt(self, available: int = 0) -> Attempt:
        state, wall_s = self._scheduler, self._services.clock.wall_s()
        fold = None
        if state.stage is WorkKind.TRAIN and self.layout is not None:
            fold, self._spare = self._spare or self.plan.open_fold(self.layout.moving.num_values), None
        place = self.job_id, state.version, state.attempt, state.stage
        deadline_at = wall_s + self.job.schedule.deadline_s
        return Attempt(AttemptRecord(*place, wall_s, deadline_at, available=available), self._now_s(), fold)

    def _over(self, attempt: Attempt, outcome: str, reason: str = "") -> AttemptRecord:
        return replace(attempt.record, closed_at=self._services.clock.wall_s(), outcome=outcome, reason=reason)

    def _assignment(self, attempt: Attempt, assignment_id: str, client: str) -> Assignment:
        deadline_s = self._scheduler.deadline_s - self._now_s()
        place, base_digest = (attempt, assignment_id, client), self.record.base_digest
        return self.orders.assignment(
            *place, layout=self.layout, latest=self.latest, base_digest=base_digest, deadline_s=deadline_s
        )

    async def _recover(self) -> None:
        """Go on from the journal: the newest version, and the attempt that was open when the process ended."""
        found = await self._services.in_worker(partial(recover, self.record, self.plan, self.layout, self._services))
        self.latest, self._scheduler, self.attempt, self.traffic.before, self.orders.counted, privacy = found
        self.books = Books(privacy, self._services, self.plan)
        self.record = await self._added_up()
