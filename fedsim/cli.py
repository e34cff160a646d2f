"""The command `fedsim`."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fedclient.cli import DataOption, DeviceOption, TaskFileOption, ThreadsOption, parse_data
from fedcore import logs
from fedcore.cli import JsonOption, LogFormatOption, LogLevelOption, new_app, print_json, run_app
from fedcore.errors import ConfigError, FedError, JobFailed
from fedcore.jobfile import Job, load_job

if TYPE_CHECKING:
    from fedserver.initial.folder import OpenAdapter
    from fedsim.simulation import Simulated, SimulatedClient
    from fedsim.summary import Summary

PROGRAM = "fedsim"

ClientsOption = Annotated[
    int | None, typer.Option("--clients", min=1, max=100_000, help="How many clients; default: the cohort.")
]

app = new_app("Roundtable's simulator: the server and its clients in one process, on virtual time.")


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    clients: ClientsOption = None,
    data: DataOption = None,
    task_file: TaskFileOption = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="DIR", help="PEFT adapter folder to start from.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for adapter, model card and plot; default: simulated/JOB.")
    ] = None,
    pooled: Annotated[
        bool,
        typer.Option("--pooled/--no-pooled", help="Also train on all data in one place, as the bound to compare with."),
    ] = True,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> None:
    """Run a job to its end with simulated clients, and export the result.

    The same job with the same clients on a real server gives the same bytes. `{shard}` in a --data value stands for
    the client's number, counted from 0.
    """
    _prepare(task_file, log_level, log_format)
    from fedserver.initial.folder import open_adapter
    from fedserver.rounds.plan import make_plan
    from fedsim.simulation import make_clients

    parsed = make_plan(load_job(job), str(job)).job
    members = make_clients(parsed, clients or parsed.schedule.cohort, parse_data(data or []))
    with ExitStack() as stack:
        given = None if adapter is None else stack.enter_context(open_adapter(adapter, parsed))
        simulated = _simulate(parsed, members, device, threads, given)
        folder = out or Path("simulated") / parsed.job.name
        summary = _conclude(parsed, members, simulated, folder, pooled, device, threads, given)
    if as_json:
        print_json(summary.as_json())
    else:
        for key, value in summary.as_json().items():
            shown = value if not isinstance(value, float) else f"{value:.1%}" if "accuracy" in key else f"{value:.3g}"
            typer.echo(f"{key:<20}{shown}")


@app.command()
def compare(
    jobs: Annotated[list[Path], typer.Argument(metavar="JOB...", help="The job files.")],
    clients: ClientsOption = None,
    data: DataOption = None,
    task_file: TaskFileOption = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, help="Run each job so often, with its seed and the next ones.")
    ] = 1,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the plot and, in JOB, what `fedsim run` leaves.")
    ] = Path("simulated") / "compare",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> None:
    """Run jobs one after another, each as `fedsim run --no-pooled` does, and compare accuracy, loss, bytes and error.

    A job that fails does not keep the others from being compared.
    """
    _prepare(task_file, log_level, log_format)
    from fedserver.export.plot import PLOT_MISSING
    from fedsim.comparison import Run, load_jobs, table, write_plot
    from fedsim.simulation import make_clients

    loaded = load_jobs(jobs, seeds)
    runs: list[Run] = []
    failures: list[str] = []
    for job in loaded:
        name, seed = job.job.name, job.job.seed
        folder = out / name if seeds == 1 else out / f"seed-{seed}" / name
        try:
            members = make_clients(job, clients or job.schedule.cohort, parse_data(data or []))
            simulated = _simulate(job, members, device, threads)
            summary = _conclude(job, members, simulated, folder, False, device, threads)
        except FedError as error:
            failures += [f"{name}, seed {seed}: {line}" for line in str(error).splitlines()]
        else:
            runs.append(Run(name, seed, summary, simulated.history))
    plot = write_plot(runs, out)
    if as_json:
        typer.echo(json.dumps([run.as_json() for run in runs]))
    elif runs:
        typer.echo("\n".join([*table(runs), PLOT_MISSING if plot is None else f"plot: {plot}"]))
    if failures:
        raise JobFailed("\n".join(failures))


def _prepare(task_file: list[Path] | None, log_level: str, log_format: logs.LogFormat) -> None:
    if find_spec("torch") is None:
        raise ConfigError("the simulator needs torch: pip install 'roundtable[sim]'")
    from fedclient.tasks.files import load_task_file

    logs.configure(log_level, log_format=log_format)
    for file in task_file or ():
        load_task_file(file)


def _simulate(
    job: Job, members: list[SimulatedClient], device: str, threads: int, adapter: OpenAdapter | None = None
) -> Simulated:
    """Run the simulation on a thread of its own, while this one shows it on standard error."""
    from rich.console import Console

    from fedserver.cli.live import follow
    from fedsim.simulation import simulate

    statuses: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    result: Future[Simulated] = Future()
    loop = asyncio.new_event_loop()

    def compute() -> None:
        try:
            run = simulate(job, members, device=device, threads=threads, adapter=adapter, show=statuses.put)
            result.set_result(loop.run_until_complete(run))
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, and raised there
            result.set_exception(error)
        finally:
            loop.close()
            statuses.put(None)

    thread = threading.Thread(target=compute, name="simulation")
    thread.start()
    try:
        follow(_until_none(statuses), Console(stderr=True))
    except KeyboardInterrupt:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        raise
    finally:
        thread.join()
    return result.result()


def _conclude(
    job: Job,
    members: list[SimulatedClient],
    simulated: Simulated,
    out: Path,
    pooled: bool,
    device: str,
    threads: int,
    adapter: OpenAdapter | None = None,
) -> Summary:
    from fedcore.layout import Layout
    from fedserver.export import Exportable, export_version
    from fedsim.pooled import measure
    from fedsim.simulation import FEDERATION
    from fedsim.summary import summarise

    what = Exportable(
        federation=FEDERATION,
        job_id=simulated.job_id,
        job=job,
        layout=Layout.from_json(simulated.layout),
        version=simulated.version.version,
        state_sha256=simulated.version.state_blob,
        basis_sha256=simulated.version.basis_blob,
        base_digest=simulated.status["base_digest"],
        adapter_sha256=simulated.status["adapter_sha256"],
        history=simulated.history,
        changes=simulated.changes,
        privacy=simulated.status["privacy"],
    )
    exported = export_version(what, simulated.state, out, force=True)
    bounds = measure(job, [member.data for member in members], device, threads, adapter) if pooled else None
    summary = summarise(job, simulated.history, len(members), bounds, exported)
    out.with_name(f"{out.name}.json").write_text(json.dumps(summary.as_json(), indent=2) + "\n", encoding="utf-8")
    return summary


def _until_none(statuses: queue.SimpleQueue[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
    while (status := statuses.get()) is not None:
        yield status


def main() -> NoReturn:
    """Run the command line."""
    sys.exit(run_app(app, PROGRAM))
