"""The scheduler: a pure state machine that decides who works on what, and when a version closes.

Events go in, commands come out. It knows no sockets, threads, clock or database: time is a number that comes with each
event. The daemon, the simulator and the property tests run this same code.

A job goes through *stages*: INITIALISE (version 0), TRAIN (once for every further version; GRADIENT for version 1 of a
job that starts from its clients' gradients), EVALUATE (the last version). A stage is tried in *attempts*. An attempt

1. waits for clients: until `cohort` (less those that are here and refuse the job; or the quorum, if that is more) are
   available, or until the deadline with at least a quorum;
2. is open: it has been assigned and collects updates until `buffer` are accepted, or nobody is left who could send
   one, or the deadline comes. With a quorum it closes; below, it is abandoned and tried again with a new attempt;
3. is closing: the engine computes the version and says `Written`.

After `max_retries` abandoned attempts in a row the job fails, so nothing here waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fedcore.jobfile import ScheduleSection
from fedcore.messages import WorkKind
from fedcore.rng import stream


class Phase(StrEnum):
    """What a job is doing."""

    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    FINISHED = "finished"
    FAILED = "failed"


# -- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Available:
    """A client is connected and idle."""

    client: str


@dataclass(frozen=True)
class Unavailable:
    """A client is busy with something, or `gone`. Work that it has in hand may still arrive."""

    client: str
    gone: bool = False


@dataclass(frozen=True)
class Accepted:
    """An assigned client's update is durable."""

    client: str


class Drop(StrEnum):
    """Why nothing that counts will come from a client for this attempt, and so when it is asked again.

    All but REFUSES are also asked again for the next version, or when an attempt has waited for others until its
    deadline: better they than nobody. A client that always fails cannot use up a job's retries at once.
    """

    REFUSES = "refuses"  # it cannot do this job: when it comes anew
    PASSES = "passes"  # it cannot now: when it comes anew
    REJECTED = "rejected"  # its update did not count: coming anew does not help


@dataclass(frozen=True)
class Dropped:
    """An assigned client will send nothing that counts for this attempt."""

    client: str
    why: Drop


@dataclass(frozen=True)
class Taken:
    """Clients that were to be assigned have just been taken by another job: nobody was assigned."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """The version (or the final evaluation) that was closing is durable."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Available | Unavailable | Accepted | Dropped | Taken | Written | Tick


# -- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assign:
    """Give this stage's work to `clients`; none of them counts as available until the next `Available`.

    They were drawn from `available` candidates; 0 after an abandoned attempt, for who is drawn then is no matter of
    chance alone.
    """

    clients: tuple[str, ...]
    available: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Close:
    """Compute the version from what was accepted. `unfinished` clients' work is no longer wanted."""

    unfinished: tuple[str, ...]


@dataclass(frozen=True)
class Abandon:
    """Give the attempt up; a new one has begun, unless `final`: then the job has failed."""

    attempt: int
    unfinished: tuple[str, ...]
    reason: str
    final: bool


@dataclass(frozen=True)
class Finish:
    """Every stage is done."""


Command = Assign | Close | Abandon | Finish


def stage_after(latest_version: int | None, rounds: int, from_gradient: bool = False) -> tuple[WorkKind, int]:
    """Return what comes once `latest_version` is durable (None: no version is), and the version that it works on.

    With `from_gradient` version 1 is not trained: it is the start that the server makes of the clients' gradients.
    """
    if latest_version is None:
        return WorkKind.INITIALISE, 0
    if latest_version == 0 and from_gradient:
        return WorkKind.GRADIENT, 0
    return (WorkKind.TRAIN if latest_version < rounds else WorkKind.EVALUATE), latest_version


@dataclass(frozen=True)
class Waiting:
    """What an attempt waits for, for `status`: how many of what are missing, and which clients have work in hand."""

    kind: str  # "clients", "updates", "write" or "" (nothing)
    missing: int
    clients: tuple[str, ...] = ()


@dataclass
class Scheduler:
    """See the module's text. All fields are plain data, so a state can be compared and restored."""

    schedule: ScheduleSection
    rounds: int
    seed: int
    from_gradient: bool = False
    stage: WorkKind = WorkKind.INITIALISE
    version: int = 0  # that the stage works on: the base for GRADIENT and TRAIN, the result for INITIALISE and EVALUATE
    attempt: int = 0
    abandoned: int = 0  # in a row
    phase: Phase = Phase.WAITING
    since_s: float = 0.0
    deadline_s: float = 0.0
    available: set[str] = field(default_factory=set)
    barred: dict[str, Drop] = field(default_factory=dict)
    working: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)

    @staticmethod
    def start(
        schedule: ScheduleSection, rounds: int, seed: int, now_s: float, *, from_gradient: bool = False
    ) -> Scheduler:
        """Begin a new job; `from_gradient` as for `stage_after`."""
        state = Scheduler(schedule, rounds, seed, from_gradient)
        state._wait(now_s)
        return state

    @staticmethod
    def resume(
        schedule: ScheduleSection,
        rounds: int,
        seed: int,
        now_s: float,
        *,
        latest_version: int | None,
        attempt: int,
        working: Iterable[str],
        accepted: Iterable[str],
        is_over: bool = False,
        from_gradient: bool = False,
    ) -> Scheduler:
        """Go on after a restart, with what the journal says of the attempt that was open.

        `attempt` counts from 0 in each stage, so it is also how many were abandoned in a row. `working` and `accepted`
        are empty when nothing had been assigned. The attempt gets its whole deadline again: how much of it had passed
        is not known on this process's clock. `is_over`: the last evaluation is durable, and the job's end is not.
        """
        state = Scheduler(schedule, rounds, seed, from_gradient)
        state.stage, state.version = stage_after(latest_version, rounds, from_gradient)
        state._wait(now_s)
        state.attempt = state.abandoned = attempt
        state.working, state.accepted = set(working), set(accepted)
        if state.working or state.accepted or is_over:
            state.phase = Phase.OPEN  # an evaluation without anybody left to hear of closes with the first tick
        return state

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Take one event at time `now_s` (seconds, never going back) and say what is to be done, in order."""
        if isinstance(event, Written):
            return self._advance(now_s) if self.phase is Phase.CLOSING else []
        self._note(event, now_s)
        return self._decide(now_s)

    def _note(self, event: Event, now_s: float) -> None:
        match event:
            case Available(client):
                self.available.add(client)
            case Unavailable(client, gone):
                self.available.discard(client)
                if gone and self.barred.get(client) is not Drop.REJECTED:
                    self.barred.pop(client, None)
            case Accepted(client):
                if client in self.working:
                    self.working.discard(client)
                    self.accepted.add(client)
            case Dropped(client, why):
                if client in self.working or why is Drop.REFUSES:
                    self.barred[client] = why
                self.working.discard(client)
            case Taken(clients):
                self.available -= set(clients)
                if self.phase is Phase.OPEN and not self.accepted:
                    self._wait(now_s)

    def end_here(self, now_s: float) -> list[Command]:
        """Make the newest version the last one, and evaluate it; those who were to be assigned are available again."""
        self.available |= self.working
        self.rounds, self.stage = self.version, WorkKind.EVALUATE
        self.attempt = self.abandoned = 0
        self._forgive()
        self._wait(now_s)
        return self._decide(now_s)

    def waiting_for(self) -> Waiting:
        """Say what the job waits for now."""
        match self.phase:
            case Phase.WAITING:
                return Waiting("clients", max(0, self._wanted() - len(self._candidates())))
            case Phase.OPEN:
                missing = max(0, self._to_close() - len(self.accepted))
                return Waiting("updates", missing, tuple(sorted(self.working)))
            case Phase.CLOSING:
                return Waiting("write", 1)
            case _:
                return Waiting("", 0)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, now_s: float) -> list[Command]:
        if self.phase is Phase.WAITING:
            return self._try_to_open(now_s)
        if self.phase is Phase.OPEN:
            return self._try_to_close(now_s)
        return []

    def _try_to_open(self, now_s: float) -> list[Command]:
        late = now_s >= self.deadline_s
        if late and len(self._candidates()) < self._quorum():
            self._forgive()
        candidates = self._candidates()
        if len(candidates) >= self._wanted() or (late and len(candidates) >= self._quorum()):
            chosen = self._choose(candidates)
            self.working = set(chosen)
            self.available -= self.working  # else a client lost to another job is chosen again until no try is left
            self.phase = Phase.OPEN
            self.since_s, self.deadline_s = now_s, now_s + self.schedule.deadline_s
            return [Assign(chosen, 0 if self.attempt else len(candidates))]
        if not late:
            return []
        if self.stage is WorkKind.EVALUATE:  # nobody came to evaluate: the result stands without figures
            return self._close(now_s)
        return self._abandon(f"{len(candidates)} clients available, quorum is {self._quorum()}", now_s)

    def _try_to_close(self, now_s: float) -> list[Command]:
        num_accepted = len(self.accepted)
        if num_accepted >= self._to_close():
            return self._close(now_s)
        if self.working and now_s < self.deadline_s:
            return []
        if num_accepted >= self._quorum() or self.stage is WorkKind.EVALUATE:
            return self._close(now_s)
        why = "deadline passed" if self.working else "no assigned client is left"
        return self._abandon(f"{why}: {num_accepted} updates accepted, quorum is {self._quorum()}", now_s)

    def _close(self, now_s: float) -> list[Command]:
        self.phase = Phase.CLOSING
        self.since_s = now_s
        unfinished = tuple(sorted(self.working))
        self.working = set()
        return [Close(unfinished)]

    def _abandon(self, reason: str, now_s: float) -> list[Command]:
        self.abandoned += 1
        final = self.abandoned > self.schedule.max_retries
        command = Abandon(self.attempt, tuple(sorted(self.working)), reason, final)
        self.attempt += 1
        self._wait(now_s)
        if final:
            self.phase = Phase.FAILED
            return [command]
        return [command, *self._decide(now_s)]

    def _advance(self, now_s: float) -> list[Command]:
        """Go to the next stage after a version is durable."""
        if self.stage is WorkKind.EVALUATE:
            self.phase, self.since_s = Phase.FINISHED, now_s
            return [Finish()]
        written = self.version + (self.stage in (WorkKind.GRADIENT, WorkKind.TRAIN))
        self.stage, self.version = stage_after(written, self.rounds, self.from_gradient)
        self.attempt = self.abandoned = 0
        self._forgive()
        self._wait(now_s)
        return self._decide(now_s)

    def _wait(self, now_s: float) -> None:
        self.phase = Phase.WAITING
        self.since_s, self.deadline_s = now_s, now_s + self.schedule.deadline_s
        self.working, self.accepted = set(), set()

    def _forgive(self) -> None:
        self.barred = {client: why for client, why in self.barred.items() if why is Drop.REFUSES}

    # -- numbers that depend on the stage ----------------------------------------------------------------------------

    def _candidates(self) -> list[str]:
        return sorted(self.available - self.barred.keys())

    def _wanted(self) -> int:
        """Clients that open the attempt at once; never fewer than the quorum, or it could not close.

        Who is here and refuses this job, or has failed at it, is not waited for: perhaps nobody else will ever come.
        """
        if self.stage is WorkKind.INITIALISE:
            return 1
        return max(self.schedule.cohort - len(self.barred), self._quorum())

    def _quorum(self) -> int:
        is_round = self.stage in (WorkKind.GRADIENT, WorkKind.TRAIN)
        return self.schedule.updates_at_deadline if is_round else 1

    def _to_close(self) -> int:
        match self.stage:
            case WorkKind.INITIALISE:
                return 1
            case WorkKind.GRADIENT | WorkKind.TRAIN:
                return self.schedule.updates_to_close
            case WorkKind.EVALUATE:
                return len(self.working) + len(self.accepted)

    def _choose(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Draw the cohort: uniform without replacement, from a stream of its own for each attempt.

        The last version is evaluated by everybody who is there, so that its figures cover as much data as they can.
        """
        most = 1 if self.stage is WorkKind.INITIALISE else self.schedule.clients_to_assign
        if len(candidates) <= most or self.stage is WorkKind.EVALUATE:
            return tuple(candidates)
        rng = stream(self.seed, "select", self.stage.value, self.version, self.attempt)
        return tuple(candidates[i] for i in sorted(rng.choice(len(candidates), size=most, replace=False)))
