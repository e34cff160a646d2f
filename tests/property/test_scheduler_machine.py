"""Invariants of the scheduler over arbitrary event sequences, and its recovery after a crash at any moment.

The oracle is a bookkeeper of its own: it sees events and commands, never the scheduler's fields.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedcore.jobfile import ScheduleSection
from fedcore.messages import WorkKind
from fedserver.rounds.scheduler import (
    Abandon,
    Accepted,
    Assign,
    Available,
    Close,
    Command,
    Drop,
    Dropped,
    Event,
    Finish,
    Phase,
    Scheduler,
    Taken,
    Tick,
    Unavailable,
    Written,
)

CLIENTS = [f"c{number}" for number in range(8)]
SEED = 7
ROUND_STAGES = (WorkKind.GRADIENT, WorkKind.TRAIN)


def stages(rounds: int, from_gradient: bool) -> list[tuple[WorkKind, int]]:
    """Return what a job goes through, with the version that each makes; the last one counts as one more."""
    first = WorkKind.GRADIENT if from_gradient else WorkKind.TRAIN
    later = ((WorkKind.TRAIN, version) for version in range(2, rounds + 1))
    return [(WorkKind.INITIALISE, 0), (first, 1), *later, (WorkKind.EVALUATE, rounds + 1)]


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleSection:
    cohort = draw(st.integers(1, 6))
    over_select = draw(st.sampled_from([1.0, 1.3, 1.5, 2.0]))
    buffer = draw(st.none() | st.integers(1, ScheduleSection(cohort=cohort, over_select=over_select).clients_to_assign))
    quorum = draw(st.none() | st.integers(1, cohort if buffer is None else buffer))
    return ScheduleSection(
        cohort=cohort,
        over_select=over_select,
        buffer=buffer,
        quorum=quorum,
        deadline_s=draw(st.sampled_from([1.0, 10.0, 60.0])),
        max_retries=draw(st.integers(0, 4)),
    )


@dataclass
class Books:
    """What an onlooker knows of a job."""

    plan: ScheduleSection
    rounds: int
    from_gradient: bool = False
    stage: WorkKind = WorkKind.INITIALISE
    version: int = 0
    abandoned: int = 0
    opened_s: float | None = None
    waiting_since_s: float = 0.0
    closing: bool = False
    ended: bool = False
    failed: bool = False
    connected: set[str] = field(default_factory=set)  # idle as far as events and assignments tell
    refusing: set[str] = field(default_factory=set)
    failing: dict[str, Drop] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    @property
    def working(self) -> set[str]:
        return self.assigned - self.accepted - self.dropped

    @property
    def fit(self) -> set[str]:
        return self.connected - self.refusing - self.failing.keys()

    @property
    def quorum(self) -> int:
        buffer = self.plan.cohort if self.plan.buffer is None else self.plan.buffer
        half = (buffer + 1) // 2 if self.plan.quorum is None else self.plan.quorum
        return half if self.stage in ROUND_STAGES else 1

    def hear(self, event: Event, now_s: float) -> None:
        match event:
            case Taken(clients):
                self.connected -= set(clients)
                if self.opened_s is not None and not self.closing and not self.accepted:
                    self.begin(now_s)
            case Available(client):
                self.connected.add(client)
            case Unavailable(client, gone):
                self.connected.discard(client)
                if gone:
                    self.refusing.discard(client)
                    if self.failing.get(client) is Drop.PASSES:
                        del self.failing[client]
            case Accepted(client):
                if client in self.working and not self.closing:
                    self.accepted.add(client)
            case Dropped(client, why):
                self._hear_drop(client, why)
            case _:
                pass

    def _hear_drop(self, client: str, why: Drop) -> None:
        if why is Drop.REFUSES:
            self.refusing.add(client)
            self.failing.pop(client, None)
        elif client in self.working:
            self.failing[client] = why
            self.refusing.discard(client)
        if client in self.working:
            self.dropped.add(client)

    def obey(self, command: Command, now_s: float) -> None:
        """Check one command against what was heard, and take it down."""
        assert not self.ended
        match command:
            case Assign(clients):
                self._check_assign(clients, now_s)
                self.assigned, self.opened_s = set(clients), now_s
                self.connected -= self.assigned
            case Close(unfinished):
                assert set(unfinished) == self.working
                assert list(unfinished) == sorted(unfinished)
                if self.stage is not WorkKind.EVALUATE:
                    assert len(self.accepted) >= self.quorum
                self.closing = True
            case Abandon(attempt, unfinished, reason, final):
                assert self.stage is not WorkKind.EVALUATE
                assert len(self.accepted) < self.quorum
                assert set(unfinished) == self.working
                assert attempt == self.abandoned
                assert str(self.quorum) in reason
                self.abandoned += 1
                assert final == (self.abandoned == self.plan.max_retries + 1)
                self.ended = self.failed = final
                self.begin(now_s)
            case Finish():
                assert self.stage is WorkKind.EVALUATE
                assert self.closing
                self.ended = True

    def _check_assign(self, clients: tuple[str, ...], now_s: float) -> None:
        assert not self.assigned, "an attempt is assigned once"
        assert len(set(clients)) == len(clients) > 0
        if len(self.fit) < self.quorum:  # only an attempt that waited in vain takes them again
            assert now_s >= self.waiting_since_s + self.plan.deadline_s
            self.failing = {}
        assert set(clients) <= self.fit
        most = 1 if self.stage is WorkKind.INITIALISE else math.ceil(round(self.plan.cohort * self.plan.over_select, 6))
        if self.stage is WorkKind.EVALUATE:
            most = len(self.connected)
        assert self.quorum <= len(clients) <= most
        assert len(clients) == min(most, len(self.fit))

    def begin(self, now_s: float) -> None:
        self.assigned, self.accepted, self.dropped = set(), set(), set()
        self.opened_s, self.waiting_since_s, self.closing = None, now_s, False

    def written(self, now_s: float) -> None:
        """A close became durable: the only way forward."""
        if self.stage is WorkKind.EVALUATE:
            return
        if self.stage in ROUND_STAGES:
            self.version += 1
        self.stage = next(kind for kind, version in stages(self.rounds, self.from_gradient) if version > self.version)
        self.abandoned = 0
        self.failing = {}
        self.begin(now_s)


class SchedulerMachine(RuleBasedStateMachine):
    """Any event at any time, sensible or not."""

    @initialize(plan=schedules(), rounds=st.integers(1, 4), from_gradient=st.booleans())
    def begin(self, plan: ScheduleSection, rounds: int, from_gradient: bool) -> None:
        self.now_s = 0.0
        self.plan, self.rounds = plan, rounds
        self.state = Scheduler.start(plan, rounds, SEED, self.now_s, from_gradient=from_gradient)
        self.books = Books(plan, rounds, from_gradient)
        self.history: list[tuple[Event, float, list[Command]]] = []

    def send(self, event: Event) -> None:
        closing, ended = self.books.closing, self.books.ended
        commands = self.state.step(event, self.now_s)
        note(f"{self.now_s}: {event} -> {commands}")
        self.history.append((event, self.now_s, commands))
        if ended:
            assert commands == []
            return
        self.books.hear(event, self.now_s)
        if closing and isinstance(event, Written):
            self.books.written(self.now_s)
        elif closing:
            assert commands == []
        for command in commands:
            self.books.obey(command, self.now_s)
        if not self.books.ended and not self.books.closing:
            self.check_nothing_is_overdue()

    def check_nothing_is_overdue(self) -> None:
        """After every event: what had to happen by now has happened."""
        books = self.books
        if books.opened_s is None:
            assert self.now_s < books.waiting_since_s + self.plan.deadline_s
            wanted = max(self.plan.cohort - len(books.refusing | books.failing.keys()), books.quorum)
            wanted = 1 if books.stage is WorkKind.INITIALISE else wanted
            assert len(books.fit) < wanted
        else:
            assert books.working
            assert self.now_s < books.opened_s + self.plan.deadline_s
            if books.stage in ROUND_STAGES:
                assert len(books.accepted) < (self.plan.buffer or self.plan.cohort)

    @rule(client=st.sampled_from(CLIENTS))
    def arrives(self, client: str) -> None:
        self.send(Available(client))

    @rule()
    def all_arrive(self) -> None:
        for client in CLIENTS:
            self.send(Available(client))

    @rule(client=st.sampled_from(CLIENTS), gone=st.booleans())
    def leaves(self, client: str, gone: bool) -> None:
        self.send(Unavailable(client, gone))

    @rule(client=st.sampled_from(CLIENTS))
    def anybody_is_accepted(self, client: str) -> None:
        self.send(Accepted(client))

    @precondition(lambda self: self.books.working)
    @rule(data=st.data())
    def a_worker_is_accepted(self, data: st.DataObject) -> None:
        self.send(Accepted(data.draw(st.sampled_from(sorted(self.books.working)))))

    @rule(client=st.sampled_from(CLIENTS), why=st.sampled_from(Drop))
    def anybody_drops(self, client: str, why: Drop) -> None:
        self.send(Dropped(client, why))

    @rule(clients=st.sets(st.sampled_from(CLIENTS)))
    def another_job_was_quicker(self, clients: set[str]) -> None:
        self.send(Taken(tuple(sorted(clients))))

    @rule(share=st.sampled_from([0.0, 0.4, 1.0, 1.7]))
    def time_passes(self, share: float) -> None:
        self.now_s += share * self.plan.deadline_s
        self.send(Tick())

    @rule()
    def something_is_written(self) -> None:
        self.send(Written())

    @precondition(lambda self: self.books.closing and not self.books.ended)
    @rule()
    def the_version_is_written(self) -> None:
        self.send(Written())

    @invariant()
    def the_scheduler_and_the_books_agree(self) -> None:
        if not hasattr(self, "state"):
            return
        assert (self.state.phase is Phase.FAILED) == self.books.failed
        assert (self.state.phase is Phase.FINISHED) == (self.books.ended and not self.books.failed)
        assert (self.state.stage, self.state.version) == (self.books.stage, self.books.version)
        waiting = self.state.waiting_for()
        assert (waiting.kind == "") == self.books.ended
        assert waiting.missing >= 0
        assert set(waiting.clients) == (set() if self.books.ended or self.books.closing else self.books.working)

    def teardown(self) -> None:
        """The same events give the same commands and the same state, also from a copy made half-way."""
        if not hasattr(self, "state"):
            return
        again = Scheduler.start(self.plan, self.rounds, SEED, 0.0, from_gradient=self.books.from_gradient)
        half = len(self.history) // 2
        for event, now_s, commands in self.history[:half]:
            assert again.step(event, now_s) == commands
        copied = copy.deepcopy(again)
        for state in (again, copied):
            assert [state.step(event, now_s) for event, now_s, _ in self.history[half:]] == [
                commands for _, _, commands in self.history[half:]
            ]
            assert state == self.state


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(stateful_step_count=60)


# -- crash and resume ------------------------------------------------------------------------------------------------


@dataclass
class Journal:
    """The facts that are durable; all that a restarted server knows."""

    latest_version: int | None = None
    attempt: int = 0
    working: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    closed: list[tuple[WorkKind, int]] = field(default_factory=list)
    finished: bool = False

    def forget_attempt(self, attempt: int) -> None:
        self.attempt, self.working, self.accepted = attempt, set(), set()


class Server:
    """The least engine around a scheduler: it journals each fact when it happens, and writes what closes."""

    def __init__(self, plan: ScheduleSection, rounds: int, from_gradient: bool) -> None:
        self.plan, self.rounds, self.from_gradient = plan, rounds, from_gradient
        self.journal = Journal()
        self.now_s = 0.0
        self.pending_write = False
        self.state = Scheduler.start(plan, rounds, SEED, self.now_s, from_gradient=from_gradient)

    def crash(self) -> None:
        journal = self.journal
        self.now_s = 0.0  # another process, another monotonic clock
        self.pending_write = False
        self.state = Scheduler.resume(
            self.plan,
            self.rounds,
            SEED,
            self.now_s,
            latest_version=journal.latest_version,
            attempt=journal.attempt,
            working=journal.working,
            accepted=journal.accepted,
            from_gradient=self.from_gradient,
        )

    def step(self, event: Event) -> None:
        if isinstance(event, Accepted) and event.client in self.journal.working:
            self.journal.working.discard(event.client)
            self.journal.accepted.add(event.client)
        for command in self.state.step(event, self.now_s):
            match command:
                case Assign(clients):
                    self.journal.working = set(clients)
                case Close(unfinished):
                    self.pending_write = True
                    self.journal.working -= set(unfinished)
                case Abandon(attempt):
                    self.journal.forget_attempt(attempt + 1)
                case Finish():
                    self.journal.finished = True

    def write(self) -> None:
        self.pending_write = False
        stage = self.state.stage
        self.journal.latest_version = self.state.version + (stage in ROUND_STAGES)
        self.journal.closed.append((stage, self.journal.latest_version))
        self.journal.forget_attempt(0)
        self.step(Written())

    def idle(self) -> list[str]:
        return [client for client in CLIENTS if client not in self.journal.working | self.state.available]


def run_to_the_end(server: Server, data: st.DataObject, crashes: int) -> None:
    for _ in range(2000):
        if server.journal.finished:
            return
        if crashes and data.draw(st.integers(0, 7), label="crash at 0") == 0:
            crashes -= 1
            server.crash()
            continue
        moves: list[tuple[str, str]] = [("accept", client) for client in sorted(server.journal.working)]
        moves += [("arrive", client) for client in server.idle()]
        if server.pending_write:
            moves.append(("write", ""))
        move, client = data.draw(st.sampled_from(moves), label="move") if moves else ("tick", "")
        match move:
            case "accept":
                server.step(Accepted(client))
            case "arrive":
                server.step(Available(client))
            case "write":
                server.write()
            case _:
                server.step(Tick())
    raise AssertionError(f"no end: {server.state}")


@settings(max_examples=100)
@given(schedules(), st.integers(1, 4), st.booleans(), st.data())
def test_crashes_at_any_moment_change_no_sequence_of_closed_versions(
    plan: ScheduleSection, rounds: int, from_gradient: bool, data: st.DataObject
) -> None:
    server = Server(plan, rounds, from_gradient)
    run_to_the_end(server, data, crashes=6)
    assert server.journal.closed == [*stages(rounds, from_gradient)[:-1], (WorkKind.EVALUATE, rounds)]


@given(schedules(), st.integers(1, 4), st.booleans(), st.integers(0, 40), st.data())
def test_a_resumed_scheduler_stands_where_the_crashed_one_stood(
    plan: ScheduleSection, rounds: int, from_gradient: bool, steps: int, data: st.DataObject
) -> None:
    """While an attempt waits or is open, the journal's facts are all there is to know but who is connected."""
    server = Server(plan, rounds, from_gradient)
    for _ in range(steps):
        kind = data.draw(st.sampled_from(["accept", "arrive", "arrive", "tick"]))
        if server.pending_write:
            server.write()
        elif kind == "accept" and server.journal.working:
            server.step(Accepted(data.draw(st.sampled_from(sorted(server.journal.working)))))
        elif kind == "arrive":
            server.step(Available(data.draw(st.sampled_from(CLIENTS))))
        else:
            server.now_s += 0.7 * plan.deadline_s
            server.step(Tick())
    before = server.state
    if before.phase not in {Phase.WAITING, Phase.OPEN}:
        return
    server.crash()
    after = server.state
    for name in ("stage", "version", "attempt", "abandoned", "phase", "working", "accepted"):
        assert getattr(after, name) == getattr(before, name), name
