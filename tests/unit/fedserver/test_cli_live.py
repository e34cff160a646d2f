"""How statuses are shown while they change."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from fedserver.cli.live import follow, has_ended, show, view, what_matters
from fedserver.cli.phrases import Pace


def state(*jobs: dict[str, Any], connected: int = 2) -> dict[str, Any]:
    return {"federation": "f", "clients": {"connected": connected, "enrolled": 3}, "jobs": list(jobs)}


def running(version: int | None, **changes: Any) -> dict[str, Any]:
    row = None if version is None else {"version": version, "created_at": 1000.0 + 2 * version, "evaluation": {}}
    return {
        "job_id": "042f4fbacca24292bc3a6b272f7d73d2",
        "name": "digits",
        "rounds": 4,
        "submitted_at": 1000.0,
        "status": "running",
        "failure": "",
        "finished_at": None,
        "stage": "initialise" if version is None else "train",
        "phase": "open",
        "phase_age_s": 0.5,
        "deadline_in_s": 59.5,
        "attempt": 0,
        "fitting_clients": 2,
        "needs": {"task": "digits", "adapter": "lora", "codecs": ["bf16", "raw"]},
        "version": version,
        "waiting_for": {"what": "updates", "missing": 1, "clients": ["ann"]},
        "working": [{"client": "ann", "connected": True, "progress": 0.25}],
        "accepted": 1,
        "uplink_bytes": 10,
        "downlink_bytes": 20,
        "latest": row,
        "evaluated": None,
        "privacy": None,
        **changes,
    }


def ended(status: str = "finished", failure: str = "") -> dict[str, Any]:
    row = {"version": 4, "created_at": 1008.0, "evaluation": {"accuracy": 0.75, "num_examples": 8.0}}
    changes = {"status": status, "failure": failure, "finished_at": 1010.0, "latest": row, "evaluated": row}
    return {**running(4), **changes}


def lines_of(*states: dict[str, Any], until_end: bool = False) -> list[str]:
    file = io.StringIO()
    follow(iter(states), Console(file=file, width=40), until_end=until_end)
    return file.getvalue().splitlines()


def drawn(what: dict[str, Any], age_s: float = 0.0) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(view(what, Pace(), age_s))
    return console.export_text()


def test_a_pipe_gets_a_line_for_each_version_and_no_more() -> None:
    lines = lines_of(
        state(running(1)), state(running(1, accepted=2)), state(running(2)), state(running(2, phase_age_s=9.0))
    )
    assert [line.split(";")[0] for line in lines] == [
        "clients: 2 connected of 3 enrolled",
        "digits 042f4fba: round 1/4",
        "digits 042f4fba: round 2/4",
    ]


def test_a_pipe_hears_of_clients_that_come_and_go() -> None:
    lines = lines_of(state(running(1)), state(running(1), connected=1))
    assert lines[-1] == "clients: 1 connected of 3 enrolled"


def test_clients_that_do_not_fit_are_told_in_lines_and_in_the_view() -> None:
    waiting = {"what": "clients", "missing": 1, "clients": []}
    alone = running(1, phase="waiting", waiting_for=waiting, fitting_clients=0, working=[])
    said = "waits for 1 client (2 connected, none of them have task 'digits'"
    lines = lines_of(state(alone, connected=0), state(alone))
    assert lines[0] == "clients: 0 connected of 3 enrolled"
    assert said not in lines[1]
    assert said in lines[3]
    assert said in drawn(state(alone))


def test_lines_are_not_wrapped_or_marked_up() -> None:
    lines = lines_of(state(ended("failed", "x [bold]" + 100 * "y")))
    assert lines[1].split("; ")[1] == "failed after 10 s: x [bold]" + 100 * "y"


def test_following_ends_with_the_job() -> None:
    states = iter([state(running(1)), state(ended()), state(running(2))])
    last = follow(states, Console(file=io.StringIO()), until_end=True)
    assert last["jobs"][0]["status"] == "finished"
    assert next(states)["jobs"][0]["version"] == 2


def test_the_view_shows_progress_waiting_clients_figures_bytes_and_time_left() -> None:
    row = {"version": 1, "evaluation": {"accuracy": 0.5, "num_examples": 8.0}}
    text = drawn(state(running(2, evaluated=row)), age_s=1.0)
    for part in (
        "clients: 2 connected of 3 enrolled",
        "digits 042f4fba running",
        "2/4 rounds",
        "3.0 s left",
        "training: 1 update in, 1 missing from ann, for 1.5 s",
        "accuracy 0.5 (version 1, 8 examples)",
        "up 10 B, down 20 B",
        "25%",
    ):
        assert part in text


def test_the_view_says_who_is_away() -> None:
    text = drawn(state(running(1, working=[{"client": "bob", "connected": False, "progress": None}])))
    words = text.splitlines()[-1].split()
    assert (words[0], words[-1]) == ("bob", "away")


def test_the_view_cuts_long_lists() -> None:
    working = [{"client": f"c{number}", "connected": True, "progress": 0.0} for number in range(20)]
    text = drawn(state(*[ended()] * 7, running(1, working=working)))
    assert "and 8 more" in text
    assert "and 2 earlier: `fedserver jobs`" in text
    assert text.count("finished after") == 5


def test_the_view_of_an_idle_server_says_what_to_do() -> None:
    assert "`fedserver submit JOB` starts one" in drawn(state())


def test_a_terminal_keeps_the_last_state() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, legacy_windows=False)
    follow(iter([state(running(1)), state(ended())]), console, until_end=True)
    assert "finished after 10 s" in file.getvalue()


def test_one_status_is_lines_or_a_view() -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    show(state(running(1)), Console(file=plain, width=40))
    show(state(running(1)), Console(file=terminal, force_terminal=True, width=100))
    assert [line.split(";")[0] for line in plain.getvalue().splitlines()] == [
        "clients: 2 connected of 3 enrolled",
        "digits 042f4fba: round 1/4",
    ]
    assert "━" in terminal.getvalue()


def test_a_job_that_rests_while_the_server_stops_is_shown() -> None:
    while_at_work = {"stage", "phase_age_s", "deadline_in_s", "attempt", "accepted", "waiting_for", "working"}
    while_at_work |= {"fitting_clients", "needs"}
    resting = {key: value for key, value in running(2, phase="running").items() if key not in while_at_work}
    assert "rests while the server starts or stops" in drawn(state(resting))
    assert "rests while the server starts or stops" in lines_of(state(resting))[-1]


def test_passing_time_is_no_change() -> None:
    assert what_matters(state(running(1))) == what_matters(state(running(1, phase_age_s=3.0, deadline_in_s=1.0)))
    assert what_matters(state(running(1))) != what_matters(state(running(1, accepted=2)))


def test_a_status_has_ended_when_no_job_runs() -> None:
    assert has_ended(state(ended(), ended("stopped")))
    assert not has_ended(state(ended(), running(1)))
