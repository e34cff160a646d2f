"""The scheduler, case by case; tests/property/test_scheduler_machine.py has the invariants over any events."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

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
    Waiting,
    Written,
)

DEADLINE_S = 60.0


def rejected(client: str) -> Dropped:
    return Dropped(client, Drop.REJECTED)


def schedule(cohort: int = 3, **keys: Any) -> ScheduleSection:
    return ScheduleSection(**{"cohort": cohort, "deadline_s": DEADLINE_S, "max_retries": 2, **keys})


def feed(state: Scheduler, *events: Event, now_s: float = 0.0) -> list[Command]:
    return [command for event in events for command in state.step(event, now_s)]


def names(count: int) -> list[str]:
    return [f"c{number:02d}" for number in range(count)]


def training(plan: ScheduleSection, clients: int, rounds: int = 2) -> tuple[Scheduler, tuple[str, ...]]:
    """Return a job at time 0 that has just assigned its first TRAIN attempt, and to whom."""
    state = Scheduler.resume(plan, rounds, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    state.available = set(names(clients))  # as many as were idle when the version before was written
    (command,) = feed(state, Tick())
    assert isinstance(command, Assign)
    return state, command.clients


def test_a_job_from_the_first_client_to_the_end() -> None:
    state = Scheduler.start(schedule(2), 1, 7, 0.0)
    assert state.waiting_for() == Waiting("clients", 1)
    assert feed(state, Available("a")) == [Assign(("a",))]
    assert (state.stage, state.waiting_for()) == (WorkKind.INITIALISE, Waiting("updates", 1, ("a",)))
    assert feed(state, Accepted("a")) == [Close(())]
    assert state.waiting_for() == Waiting("write", 1)
    assert feed(state, Available("a"), Available("b")) == []
    assert feed(state, Written()) == [Assign(("a", "b"))]
    assert (state.stage, state.version) == (WorkKind.TRAIN, 0)
    assert feed(state, Accepted("b"), Accepted("a")) == [Close(())]
    assert feed(state, Available("a"), Available("b"), Written()) == [Assign(("a", "b"))]
    assert (state.stage, state.version) == (WorkKind.EVALUATE, 1)
    assert feed(state, Accepted("a"), Dropped("b", Drop.REJECTED)) == [Close(())]
    assert feed(state, Written()) == [Finish()]
    assert (state.phase, state.waiting_for()) == (Phase.FINISHED, Waiting("", 0))
    assert feed(state, Available("a"), Tick(), Written(), now_s=1e9) == []


def test_version_0_is_asked_of_one_client_however_many_are_there() -> None:
    state = Scheduler.start(schedule(3), 1, 7, 0.0)
    assert feed(state, Available("b")) == [Assign(("b",))]
    assert feed(state, *map(Available, names(5))) == []


def test_buffer_closes_at_once_and_the_unfinished_are_told() -> None:
    state, chosen = training(schedule(3, over_select=2.0, buffer=2), 6)
    assert len(chosen) == 6
    assert feed(state, Accepted(chosen[4])) == []
    assert feed(state, Accepted(chosen[1])) == [Close(tuple(sorted({*chosen} - {chosen[4], chosen[1]})))]


@pytest.mark.parametrize(("clients", "assigned"), [(3, 3), (4, 4), (5, 4)])
def test_over_selection_assigns_the_ceiling_at_most(clients: int, assigned: int) -> None:
    _, chosen = training(schedule(3, over_select=1.3), clients)  # 3.9
    assert len(chosen) == assigned


def test_with_fewer_clients_than_the_cohort_a_quorum_is_assigned_at_the_deadline() -> None:
    state = Scheduler.resume(schedule(4), 1, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    assert feed(state, Available("a"), Available("b"), Tick(), now_s=DEADLINE_S - 0.001) == []
    assert state.waiting_for() == Waiting("clients", 2)
    assert feed(state, Tick(), now_s=DEADLINE_S) == [Assign(("a", "b"))]


def test_no_attempt_opens_with_fewer_clients_than_its_quorum_needs() -> None:
    plan = schedule(2, over_select=2.0, buffer=4, quorum=3)
    state = Scheduler.resume(plan, 1, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    assert feed(state, Available("a"), Available("b")) == []
    assert state.waiting_for() == Waiting("clients", 1)
    assert feed(state, Available("c")) == [Assign(("a", "b", "c"))]


def test_below_the_quorum_of_clients_the_attempt_is_abandoned_with_the_numbers() -> None:
    state = Scheduler.resume(schedule(4), 1, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    assert feed(state, Available("a"), Tick(), now_s=DEADLINE_S) == [
        Abandon(0, (), "1 clients available, quorum is 2", final=False)
    ]
    assert feed(state, Available("b"), Tick(), now_s=2 * DEADLINE_S) == [Assign(("a", "b"))]
    assert state.attempt == 1


def test_at_the_deadline_a_quorum_closes() -> None:
    state, chosen = training(schedule(4), 4)
    feed(state, Accepted(chosen[0]), Accepted(chosen[1]))
    assert feed(state, Tick(), now_s=DEADLINE_S - 0.001) == []
    assert feed(state, Tick(), now_s=DEADLINE_S) == [Close(chosen[2:])]


def test_at_the_deadline_less_than_a_quorum_is_abandoned() -> None:
    state, chosen = training(schedule(4), 4)
    feed(state, Accepted(chosen[0]))
    assert feed(state, Tick(), now_s=DEADLINE_S) == [
        Abandon(0, chosen[1:], "deadline passed: 1 updates accepted, quorum is 2", final=False)
    ]
    assert (state.version, state.attempt, state.accepted) == (0, 1, set())


def test_nothing_is_waited_for_when_nobody_is_left_who_could_send() -> None:
    state, chosen = training(schedule(4), 4)
    assert feed(state, *map(Accepted, chosen[:2]), Dropped(chosen[2], Drop.REJECTED)) == []
    assert feed(state, Dropped(chosen[3], Drop.REJECTED)) == [Close(())]
    state, chosen = training(schedule(4), 4)
    (command,) = feed(state, Accepted(chosen[0]), *map(rejected, chosen[1:]))
    assert command == Abandon(0, (), "no assigned client is left: 1 updates accepted, quorum is 2", final=False)


def test_a_client_that_has_gone_may_still_deliver() -> None:
    state, chosen = training(schedule(2), 2)
    assert feed(state, Unavailable(chosen[0], gone=True), Accepted(chosen[1]), Accepted(chosen[0])) == [Close(())]


def test_an_update_from_nobody_assigned_does_not_count() -> None:
    state, chosen = training(schedule(2), 2)
    assert feed(state, Accepted("stranger"), Accepted(chosen[0]), Accepted(chosen[0])) == []
    assert state.accepted == {chosen[0]}


def test_the_job_fails_after_max_retries_and_one_abandoned_attempts_in_a_row() -> None:
    state = Scheduler.start(schedule(2, max_retries=2), 1, 7, 0.0)
    finals = []
    for number in range(1, 4):
        (command,) = feed(state, Tick(), now_s=number * DEADLINE_S)
        assert isinstance(command, Abandon)
        finals.append((command.attempt, command.final))
    assert finals == [(0, False), (1, False), (2, True)]
    assert state.phase is Phase.FAILED
    assert feed(state, Available("a"), Tick(), now_s=1e6) == []


def test_a_closed_version_forgives_the_abandoned_attempts_before_it() -> None:
    state = Scheduler.start(schedule(1, max_retries=1), 3, 7, 0.0)
    now_s = 0.0
    for _ in range(3):
        now_s += DEADLINE_S
        assert [type(command) for command in feed(state, Tick(), now_s=now_s)] == [Abandon]
        assert feed(state, Available("a"), Accepted("a"), now_s=now_s)[-1] == Close(())
        feed(state, Written(), now_s=now_s)
    assert (state.version, state.attempt, state.phase) == (2, 0, Phase.WAITING)


def test_a_restart_forgives_nothing() -> None:
    state = Scheduler.resume(
        schedule(2, max_retries=2), 1, 7, 0.0, latest_version=0, attempt=2, working=(), accepted=()
    )
    (command,) = feed(state, Tick(), now_s=DEADLINE_S)
    assert isinstance(command, Abandon)
    assert command.final


def test_clients_taken_by_another_job_cost_no_attempt() -> None:
    state = Scheduler.start(schedule(1, max_retries=0), 1, 7, 0.0)
    assert feed(state, Available("a")) == [Assign(("a",))]
    assert feed(state, Taken(("a",))) == []
    assert (state.phase, state.attempt, state.abandoned) == (Phase.WAITING, 0, 0)
    assert feed(state, Available("a")) == [Assign(("a",))]


def test_a_refusing_client_is_not_asked_again_until_it_comes_anew() -> None:
    state = Scheduler.start(schedule(1, max_retries=5), 1, 7, 0.0)
    feed(state, Available("a"), Dropped("a", Drop.REFUSES))
    assert feed(state, Available("a"), Unavailable("a"), Available("a")) == []
    assert feed(state, Unavailable("a", gone=True), Available("a")) == [Assign(("a",))]


def test_a_refusing_client_is_not_waited_for() -> None:
    state = Scheduler.resume(schedule(3, quorum=2), 2, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    feed(state, *map(Available, "abc"))
    feed(state, Dropped("c", Drop.REFUSES), Accepted("a"))
    assert feed(state, Accepted("b")) == [Close(())]
    assert feed(state, Available("a"), Available("b"), Written()) == [Assign(("a", "b"))]
    # It is gone, so another may come in its place.
    feed(state, Unavailable("c", gone=True), Accepted("a"))
    assert feed(state, Accepted("b")) == [Close(())]
    assert feed(state, Available("a"), Available("b"), Written()) == []
    assert state.waiting_for() == Waiting("clients", 1)


def test_a_client_that_failed_is_asked_again_when_waiting_for_others_was_in_vain() -> None:
    state = Scheduler.start(schedule(1, max_retries=5), 1, 7, 0.0)
    feed(state, Available("a"), Dropped("a", Drop.REJECTED))
    assert feed(state, Available("a")) == []
    assert state.step(Tick(), state.deadline_s) == [Assign(("a",))]


def test_a_client_that_passed_is_asked_again_when_it_comes_anew_and_one_that_was_rejected_is_not() -> None:
    for why, commands in ((Drop.PASSES, [Assign(("a",))]), (Drop.REJECTED, [])):
        state = Scheduler.start(schedule(1, max_retries=5), 1, 7, 0.0)
        feed(state, Available("a"), Dropped("a", why))
        assert feed(state, Available("a"), Unavailable("a", gone=True), Available("a")) == commands


def test_a_client_that_failed_is_asked_again_for_the_next_version() -> None:
    state = Scheduler.resume(schedule(2, quorum=1), 3, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    feed(state, Available("a"), Available("b"), Dropped("a", Drop.REJECTED), Accepted("b"))
    assert feed(state, Available("a"), Available("b"), Written()) == [Assign(("a", "b"))]


@pytest.mark.parametrize("end", ["nobody comes", "all drop", "all are silent", "one answers"])
def test_the_evaluation_ends_without_failing_whatever_happens(end: str) -> None:
    plan = schedule(3, max_retries=0)
    state = Scheduler.resume(plan, 2, 7, 0.0, latest_version=2, attempt=0, working=(), accepted=())
    if end == "nobody comes":
        commands = feed(state, Tick(), now_s=DEADLINE_S)
    else:
        (command,) = feed(state, *map(Available, names(3)))
        assert isinstance(command, Assign)
        if end == "all drop":
            commands = feed(state, *(Dropped(client, Drop.REFUSES) for client in command.clients))
        else:
            feed(state, *map(Accepted, command.clients[: end == "one answers"]))
            commands = feed(state, Tick(), now_s=DEADLINE_S)
    (close,) = commands
    assert isinstance(close, Close)
    assert feed(state, Written(), now_s=DEADLINE_S) == [Finish()]


def test_the_evaluation_waits_for_everybody_until_the_deadline() -> None:
    plan = schedule(3, buffer=1)
    state = Scheduler.resume(plan, 2, 7, 0.0, latest_version=2, attempt=0, working=names(3), accepted=())
    assert feed(state, Accepted("c00"), Accepted("c01")) == []
    assert feed(state, Accepted("c02")) == [Close(())]


def test_every_attempt_is_over_after_twice_the_deadline() -> None:
    for seconds_to_assign, accepted in itertools.product((0, 30, 59, 60), (0, 1, 2)):
        plan = schedule(3, max_retries=100)
        state = Scheduler.resume(plan, 1, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
        for second in range(121):
            events: list[Event] = [Tick()]
            if second == seconds_to_assign:
                events = [Available("a"), Available("b"), *events]
            events += [Accepted(client) for client in sorted(state.working)[:accepted]]
            if any(isinstance(command, Close | Abandon) for command in feed(state, *events, now_s=second)):
                break
        else:
            pytest.fail(f"attempt still open: assigned after {seconds_to_assign} s, {accepted} updates")


def test_resuming_with_the_buffer_full_closes_at_the_first_tick() -> None:
    state = Scheduler.resume(schedule(2), 3, 7, 5.0, latest_version=1, attempt=0, working=["c"], accepted=["a", "b"])
    assert feed(state, Tick(), now_s=5.0) == [Close(("c",))]


def test_resuming_with_every_update_in_but_the_version_not_written_closes_at_the_first_tick() -> None:
    state = Scheduler.resume(schedule(2), 3, 7, 5.0, latest_version=1, attempt=0, working=(), accepted=["a"])
    assert feed(state, Tick(), now_s=5.0) == [Close(())]


def test_resuming_gives_the_whole_deadline_again() -> None:
    state = Scheduler.resume(schedule(2), 3, 7, 1000.0, latest_version=1, attempt=0, working=["a", "b"], accepted=())
    assert feed(state, Tick(), now_s=1059.9) == []
    assert [type(command) for command in feed(state, Tick(), now_s=1060.0)] == [Abandon]


def test_a_deadline_of_the_least_length_passes_on_a_clock_that_has_run_for_years() -> None:
    state = Scheduler.start(schedule(1, deadline_s=0.001, max_retries=10**6), 1, 7, 1e9)
    assert [type(command) for command in feed(state, Tick(), now_s=1e9 + 1)] == [Abandon]
    assert feed(state, Tick(), now_s=1e9 + 1) == []


def test_each_attempt_and_each_version_draws_its_own_cohort() -> None:
    drawn = set()
    for version, attempt in itertools.product(range(4), range(4)):
        plan = schedule(3)
        state = Scheduler.resume(plan, 9, 7, 0.0, latest_version=version, attempt=attempt, working=(), accepted=())
        state.available = set(names(30))
        (command,) = feed(state, Tick())
        assert isinstance(command, Assign)
        drawn.add(command.clients)
    assert len(drawn) == 16


def test_selection_is_uniform_over_all_cohorts() -> None:
    """Every pair out of five clients is equally likely.

    Pearson's chi-square over the 10 pairs, 9 degrees of freedom: a uniform choice exceeds 44.81 once in a million job
    seeds (the seeds are fixed, so this either always passes or never).
    """
    draws = 5000
    counts: Counter[tuple[str, ...]] = Counter()
    for seed in range(draws):
        state = Scheduler.resume(schedule(2), 1, seed, 0.0, latest_version=0, attempt=0, working=(), accepted=())
        state.available = set(names(5))
        (command,) = feed(state, Tick())
        assert isinstance(command, Assign)
        counts[command.clients] += 1
    assert set(counts) == set(itertools.combinations(names(5), 2))
    expected = draws / 10
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 44.81


def test_selection_depends_on_the_set_of_clients_and_not_on_who_came_first() -> None:
    chosen = set()
    for order in itertools.permutations(names(4)):
        state = Scheduler.resume(schedule(2), 1, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
        for client in order:
            state.available.add(client)
        (command,) = feed(state, Tick())
        assert isinstance(command, Assign)
        chosen.add(command.clients)
    assert len(chosen) == 1


def test_who_is_drawn_after_an_abandoned_attempt_was_not_drawn_by_chance_alone() -> None:
    state = Scheduler.resume(schedule(2), 3, 7, 0.0, latest_version=0, attempt=0, working=(), accepted=())
    state.available = set(names(5))
    (first,) = feed(state, Tick())
    assert isinstance(first, Assign)
    abandoned, again = feed(state, *(rejected(client) for client in first.clients))
    assert isinstance(abandoned, Abandon)
    assert isinstance(again, Assign)
    assert (first.available, again.available) == (5, 0)


def test_a_job_that_ends_here_evaluates_its_newest_version() -> None:
    state, chosen = training(schedule(2), 3)
    assert state.end_here(0.0) == [Assign(tuple(names(3)))]
    assert (state.stage, state.version, state.attempt) == (WorkKind.EVALUATE, 0, 0)
    assert set(chosen) <= state.working
    ended = feed(state, *(Accepted(client) for client in names(3)), Written())
    assert [type(each) for each in ended] == [Close, Finish]
