"""`fedserver submit`, `jobs`, `status` and `stop`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.cli import JsonOption, print_json
from fedcore.errors import JobFailed
from fedserver.cli.options import DEFAULT_FOLDER, FolderOption, JobArgument

if TYPE_CHECKING:
    from fedserver.rpc.operator_client import OperatorClient


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(submit)
    app.command()(jobs)
    app.command()(status)
    app.command()(stop)


def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="A job file.", show_default=False)],
    folder: FolderOption = DEFAULT_FOLDER,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="PEFT adapter folder to start from.", show_default=False),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job until it ends; exit 10 if it fails.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a job file, start the job, print its id."""
    from fedcore.jobfile import load_job
    from fedserver.cli.connect import operator
    from fedserver.cli.progress import progress
    from fedserver.initial.folder import open_adapter
    from fedserver.rounds.plan import make_plan

    job = load_job(job_file)
    make_plan(job, str(job_file))
    with ExitStack() as stack:
        given = None if adapter is None else stack.enter_context(open_adapter(adapter, job))
        server = stack.enter_context(operator(folder))
        if given is not None:
            with progress("upload", len(given.weights)) as on_bytes:
                server.put_adapter(given.given.digest, given.weights, on_bytes)
        submitted = server.submit(job.to_json(), None if given is None else given.given)
        if as_json:
            print_json({"job_id": submitted.job_id, "name": job.job.name, "status": submitted.status})
        else:
            typer.echo(submitted.job_id)
        sys.stdout.flush()  # whoever reads this wants it before the waiting
        if wait:
            _follow(server, submitted.job_id, as_json)


def jobs(folder: FolderOption = DEFAULT_FOLDER, as_json: JsonOption = False) -> None:
    """List every job, the oldest first."""
    from fedserver.cli.connect import operator
    from fedserver.cli.text import columns, figures_text, time_text

    with operator(folder) as server:
        found = server.status()["jobs"]
    if as_json:
        print_json({"jobs": found})
        return
    if not found:
        typer.echo("no jobs yet: `fedserver submit JOB` starts one")
        return
    rows = [["JOB", "NAME", "STATUS", "ROUND", "SUBMITTED", "EVALUATION"]]
    for job in found:
        done = f"{job['version'] or 0}/{job['rounds']}"
        cells = [job["job_id"][:8], job["name"], job["status"], done]
        rows.append([*cells, time_text(job["submitted_at"]), figures_text(job["evaluated"])])
    for line in columns(rows):
        typer.echo(line)


def status(
    job: JobArgument = "",
    folder: FolderOption = DEFAULT_FOLDER,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Go on showing changes; with a JOB until it ends, exit 10 if it fails."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the server does.

    Each job's progress, what it waits for and from whom, its figures and bytes.
    """
    from fedserver.cli.connect import operator

    with operator(folder) as server:
        if watch:
            _follow(server, job, as_json)
            return
        tree = server.status(job)
    if as_json:
        print_json(tree)
        return
    from rich.console import Console

    from fedserver.cli.live import show

    show(tree, Console(highlight=False))


def stop(job: JobArgument, folder: FolderOption = DEFAULT_FOLDER, as_json: JsonOption = False) -> None:
    """End a running job.

    The versions that it has computed stay and can be exported.
    """
    from fedserver.cli.connect import operator

    with operator(folder) as server:
        stopped = server.stop(job)
    if as_json:
        print_json({"job_id": stopped.job_id, "status": stopped.status})
    else:
        typer.echo(f"{stopped.job_id} {stopped.status}")


def _follow(server: OperatorClient, job: str, as_json: bool) -> None:
    """Show changes; with a job until it ends.

    Raises:
        JobFailed: the job ended without its result.
    """
    from fedserver.cli import live

    states = server.watch(job, on_outage=lambda text: typer.echo(f"{text} trying again", err=True))
    if as_json:
        last = _follow_json(states, until_end=bool(job))
    else:
        from rich.console import Console

        last = live.follow(states, Console(highlight=False), until_end=bool(job))
    for ended in last["jobs"]:
        if job and ended["status"] != "finished":
            raise JobFailed(f"job {ended['name']} ({ended['job_id']}) {ended['status']}: {ended['failure']}")


def _follow_json(states: Iterator[dict[str, Any]], *, until_end: bool) -> dict[str, Any]:
    from fedserver.cli import live

    last: dict[str, Any] = {"jobs": []}
    for state in states:
        if live.what_matters(state) != live.what_matters(last):
            print_json(state)
            sys.stdout.flush()
        last = state
        if until_end and live.has_ended(state):
            break
    return last
