"""The server's status as people watch it: a live view on a terminal, a line for each change elsewhere.

Statuses are plain values as `fedserver.status` makes them (docs/status.md), so anything that yields them can be
followed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedserver.cli.phrases import Pace, bytes_text, clients_text, job_line, misfits_text, phase_text, privacy_text
from fedserver.cli.text import duration_text, figures_text, printable

Status = dict[str, Any]

RUNNING: Final = "running"
_BAR_WIDTH: Final = 40
_CLIENT_BAR_WIDTH: Final = 16
_MAX_CLIENTS: Final = 12
_MAX_ENDED: Final = 5
_TIMES: Final = frozenset({"phase_age_s", "deadline_in_s"})
_COLOURS: Final = {"running": "cyan", "finished": "green", "failed": "red", "stopped": "yellow"}


def follow(states: Iterable[Status], console: Console, *, until_end: bool = False) -> Status:
    """Show each status as it comes; return the last one.

    Args:
        states: the server's statuses, now and after each change.
        console: a terminal gets a view that is redrawn, with times that go on; anything else a line for each change.
        until_end: stop when every job in a status has ended.
    """
    last: Status = {"jobs": [], "clients": {"connected": 0, "enrolled": 0}}
    pace = Pace()
    if not console.is_terminal:
        shown: dict[str, str] = {}
        for last in _until(states, until_end):
            pace.see(last)
            _print_changes(last, shown, pace, console)
        return last
    drawn = (last, time.monotonic())

    def draw() -> RenderableType:
        state, came_s = drawn  # one name, so the drawing thread never sees half a change
        return view(state, pace, time.monotonic() - came_s)

    with Live(get_renderable=draw, console=console, refresh_per_second=4, vertical_overflow="ellipsis") as live:
        for last in _until(states, until_end):
            pace.see(last)
            drawn = (last, time.monotonic())
        live.refresh()
    return last


def show(state: Status, console: Console) -> None:
    """Show one status."""
    pace = Pace()
    if console.is_terminal:
        console.print(view(state, pace, 0.0))
        return
    _print(clients_text(state), console)
    for job in state["jobs"]:
        _print(job_line(job, pace, state["clients"]["connected"]), console)


def has_ended(state: Status) -> bool:
    """Whether no job in the status runs (any more)."""
    return all(job["status"] != RUNNING for job in state["jobs"])


def what_matters(state: Status) -> Status:
    """Return a status without what changes by the mere passing of time."""
    jobs = [{key: value for key, value in job.items() if key not in _TIMES} for job in state["jobs"]]
    return {**state, "jobs": jobs}


def view(state: Status, pace: Pace, age_s: float) -> RenderableType:
    """Return a status as it is drawn on a terminal.

    Args:
        state: what to draw.
        pace: how fast jobs were so far.
        age_s: seconds since the status came.
    """
    running = [job for job in state["jobs"] if job["status"] == RUNNING]
    ended = [job for job in state["jobs"] if job["status"] != RUNNING]
    parts: list[RenderableType] = [Text(clients_text(state))]
    for job in ended[-_MAX_ENDED:]:
        parts += ["", _ended(job)]
    if len(ended) > _MAX_ENDED:
        parts.append(Text(f"and {len(ended) - _MAX_ENDED} earlier: `fedserver jobs`", style="dim"))
    for job in running:
        parts += ["", _running(job, pace, age_s, state["clients"]["connected"])]
    if not state["jobs"]:
        parts.append(Text("no jobs yet: `fedserver submit JOB` starts one", style="dim"))
    return Group(*parts)


def _title(job: Status) -> Text:
    status = job["status"]
    return Text.assemble(
        (printable(job["name"]), "bold"), f" {job['job_id'][:8]} ", (status, _COLOURS.get(status, "bold"))
    )


def _ended(job: Status) -> RenderableType:
    rounds = f"{job['version'] or 0} of {job['rounds']} rounds"
    lines = [f"{rounds}: {phase_text(job)}", figures_text(job["evaluated"]), privacy_text(job), bytes_text(job)]
    return Group(_title(job), *(Text(f"  {line}") for line in lines if line))


def _running(job: Status, pace: Pace, age_s: float, connected: int) -> RenderableType:
    done, rounds = job["version"] or 0, job["rounds"]
    left_s = pace.left_s(job)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        _title(job),
        ProgressBar(total=rounds, completed=done, width=_BAR_WIDTH),
        Text(f"{done}/{rounds} rounds"),
        Text("" if left_s is None else f"{duration_text(max(0.0, left_s - age_s))} left", style="dim"),
    )
    lines = [phase_text(job, age_s, connected), figures_text(job["evaluated"]), privacy_text(job), bytes_text(job)]
    return Group(bar, *(Text(f"  {line}") for line in lines if line), *_clients(job))


def _clients(job: Status) -> Iterator[RenderableType]:
    """Yield a bar for each client that has work in hand."""
    working = job.get("working", [])  # missing while the server starts or stops
    if not working:
        return
    grid = Table.grid(padding=(0, 1))
    for client in working[:_MAX_CLIENTS]:
        progress = client["progress"]
        grid.add_row(
            Text(f"    {printable(client['client'])}"),
            ProgressBar(total=1.0, completed=progress or 0.0, width=_CLIENT_BAR_WIDTH),
            Text(f"{progress:.0%}" if client["connected"] and progress is not None else "away", style="dim"),
        )
    yield grid
    if len(working) > _MAX_CLIENTS:
        yield Text(f"    and {len(working) - _MAX_CLIENTS} more", style="dim")


def _until(states: Iterable[Status], until_end: bool) -> Iterator[Status]:
    for state in states:
        yield state
        if until_end and has_ended(state):
            return


def _print_changes(state: Status, shown: dict[str, str], pace: Pace, console: Console) -> None:
    """Print what is news to somebody who reads lines: not each update, but each version and each wait."""
    connected = state["clients"]["connected"]
    news = [("", clients_text(state), clients_text(state))]
    for job in state["jobs"]:
        waiting = job.get("waiting_for", {})
        missing = waiting.get("missing", 0) if waiting.get("what") == "clients" else 0
        misfits, figures = misfits_text(job, connected), figures_text(job["evaluated"])
        key = (job["status"], job["version"], job.get("attempt"), missing, misfits, figures)
        news.append((job["job_id"], repr(key), job_line(job, pace, connected)))
    for name, key_text, line in news:
        if shown.get(name) != key_text:
            shown[name] = key_text
            _print(line, console)


def _print(line: str, console: Console) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
