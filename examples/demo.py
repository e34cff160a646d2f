"""The demo: a server and its clients as real processes on this machine, from their certificates to the adapter.

It does what an operator and the owners of five machines would do by hand, with the same commands: `fedserver init`,
`run`, `token`, `submit`, `status --watch` and `export`, `fedclient enroll` and `run`. Everything lies in demo/;
docs/demo.md explains it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from demo_parts.crew import Child, ChildFailed, Crew, Stopped
from demo_parts.folder import fresh_folder
from demo_parts.report import print_summary
from fedcodec.presets import PRESETS
from fedcore.errors import FedError, InvalidInput, JobFailed
from fedcore.jobfile import Job, load_job, parse_job
from fedserver.cli.connect import operator
from fedserver.cli.live import follow
from fedserver.cli.toml_text import toml_text
from fedserver.export import Exported
from fedserver.rounds.plan import make_plan
from fedsim.summary import Bounds, Summary, summarise

EXAMPLES: Final = Path(__file__).parent
POOLED: Final = EXAMPLES / "demo_parts" / "pooled.py"
LOOPBACK: Final = "127.0.0.1"
START_S: Final = 120.0

Tree = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the demo runs: a job's file, the same parsed, and how many clients."""

    job_file: Path
    job: Job
    num_clients: int


class Demo:
    """One run of the demo in a folder. `run` does everything, in order."""

    def __init__(self, crew: Crew, folder: Path, plan: Plan, console: Console) -> None:
        self._crew = crew
        self._folder = folder
        self._state = folder / "state"
        self._plan = plan
        self._console = console
        self._began_s = time.monotonic()
        self._names = [f"client-{number + 1}" for number in range(plan.num_clients)]

    def run(self) -> Summary:
        """Run the federation and return its figures.

        Raises:
            ChildFailed: a process failed.
            JobFailed: the job did.
        """
        crew = self._crew
        # Depends on nothing else, so it computes whenever the others leave a core idle.
        pooled = crew.start(
            "the pooled training", sys.executable, POOLED, self._plan.job_file, str(len(self._names)),
            log="pooled", nice=10,
        )  # fmt: skip
        self._start_server()
        watch = self._server("status", "--watch", "--json", lasts=True)
        self._enrol()
        clients = self._start_clients()
        states = (json.loads(line) for line in crew.lines(watch))
        self._wait_for_clients(states)
        job_id = crew.finish(self._server("submit", self._plan.job_file))[0].strip()
        self._say(f"job {job_id[:8]} submitted: {self._plan.job_file.name}, {self._plan.job.job.rounds} rounds")
        self._follow(states)
        export = self._server("export", job_id, "--out", self._folder / "adapter", "--json")
        crew.dismiss([watch, *clients])
        with operator(self._state) as server:
            history = server.version(job_id, None).history
        exported = _exported(json.loads(crew.finish(export)[0]))
        self._say("adapter, model card and plot exported")
        with self._console.status("training on all data in one place, to compare with"):
            bounds = Bounds(**json.loads(crew.finish(pooled)[0]))
        return summarise(self._plan.job, history, len(self._names), bounds, exported)

    def _start_server(self) -> None:
        ports = ("--port", "0", "--enrolment-port", "0", "--metrics-port", "0")  # any that are free
        self._crew.finish(self._server("init", "--host", LOOPBACK, "--federation", "demo", *ports))
        server = self._server("run", "--host", LOOPBACK, "--json", "--log-format", "text", log="fedserver", lasts=True)
        self._crew.expect("the server's start", START_S, server.log)
        ready = json.loads(next(self._crew.lines(server)))
        self._crew.expect_nothing()
        self._say(f"server at {ready['address']}, metrics at {ready['metrics_url']}")

    def _enrol(self) -> None:
        tokens = {name: self._folder / "tokens" / f"{name}.token" for name in self._names}
        self._crew.finish(*(self._server("token", name, output=path) for name, path in tokens.items()))
        self._crew.finish(*(self._client(name, "enroll", "--token", f"@{path}") for name, path in tokens.items()))
        self._say(f"{len(tokens)} clients enrolled, each with a certificate of its own")

    def _start_clients(self) -> list[Child]:
        shards = [("--data", f"shard={shard}") for shard in range(len(self._names))]
        common = ("--data", f"num_shards={len(shards)}", "--device", "cpu", "--log-format", "text")
        return [
            self._client(name, "run", *shard, *common, lasts=True)
            for name, shard in zip(self._names, shards, strict=True)
        ]

    def _wait_for_clients(self, states: Iterator[Tree]) -> None:
        """Wait until all are connected, so that all take part from the first round on."""
        wanted = len(self._names)
        self._crew.expect(f"{wanted} clients connected", START_S, self._folder / "logs" / f"{self._names[0]}.log")
        with self._console.status("clients start") as shown:
            for state in states:
                connected = state["clients"]["connected"]
                shown.update(f"{connected} of {wanted} clients connected")
                if connected == wanted:
                    break
        self._crew.expect_nothing()
        self._say(f"{wanted} clients connected over mutual TLS")

    def _follow(self, states: Iterator[Tree]) -> None:
        """Show the job until it ends.

        Raises:
            JobFailed: it ended without its result.
        """
        last = follow((state for state in states if state["jobs"]), self._console, until_end=True)
        for job in last["jobs"]:
            if job["status"] != "finished":
                raise JobFailed(f"job {job['name']} {job['status']}: {job['failure']}")

    def _server(
        self, command: str, *arguments: str | Path, log: str = "operator", output: Path | None = None,
        lasts: bool = False,
    ) -> Child:  # fmt: skip
        program = _program("fedserver")
        return self._crew.start(
            f"fedserver {command}", program, command, "--folder", self._state, *arguments,
            log=log, output=output, lasts=lasts,
        )  # fmt: skip

    def _client(self, name: str, command: str, *arguments: str, lasts: bool = False) -> Child:
        folder = self._folder / "clients" / name
        title = f"fedclient {command} ({name})"
        return self._crew.start(
            title, _program("fedclient"), command, "--folder", folder, *arguments, log=name, lasts=lasts
        )

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began_s:5.1f} s  {text}", highlight=False, soft_wrap=True)


def _program(name: str) -> Path:
    """Return the path of a command installed beside this Python.

    Raises:
        InvalidInput: it is not installed.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise InvalidInput(f"{path} is missing: install Roundtable first (`make venv`), or run `make demo`")
    return path


def _exported(tree: Tree) -> Exported:
    return Exported(
        folder=Path(tree["folder"]),
        files=tuple(map(Path, tree["files"])),
        weights=Path(tree["weights"]),
        model_card=Path(tree["model_card"]),
        adapter=tree["adapter"] and Path(tree["adapter"]),
        plot=tree["plot"] and Path(tree["plot"]),
    )


def _read_job(options: argparse.Namespace) -> Job:
    """Return the job with the rounds and the codec that were asked for.

    Raises:
        InvalidInput: the job file is wrong, needs more clients, or does not go with the codec.
    """
    job = load_job(options.job)
    if options.clients is not None and options.clients < job.schedule.cohort:
        raise InvalidInput(f"--clients {options.clients}: {options.job} trains {job.schedule.cohort} in each round")
    tree = job.model_dump(mode="json")
    if options.rounds is not None:
        tree["job"]["rounds"] = options.rounds
    if options.codec is not None:
        tree["compression"] = {"preset": options.codec}
    return make_plan(parse_job(tree, str(options.job)), str(options.job)).job


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a federation on this machine; docs/demo.md explains it.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument(
        "--job", type=Path, default=EXAMPLES / "digits.toml",
        help="a job file whose task deals its data by shard and num_shards (default: examples/digits.toml)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="rounds, if not those of the job file")
    parser.add_argument("--codec", choices=PRESETS, help="how updates are encoded, if not as the job file says")
    parser.add_argument("--clients", type=int, help="how many clients (default: the job's cohort)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON; progress to standard error")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    console = Console(stderr=options.json, highlight=False)
    began_s = time.monotonic()
    job = _read_job(options)
    with fresh_folder(options.folder) as folder:
        for name in ("logs", "tokens", "clients"):
            (folder / name).mkdir(mode=0o700)
        job_file = options.job.absolute()
        if options.rounds is not None or options.codec is not None:
            job_file = folder / "job.toml"
            job_file.write_text(toml_text(job.model_dump(mode="json")) + "\n", encoding="utf-8")
        plan = Plan(job_file, job, options.clients or job.schedule.cohort)
        with Crew(folder / "logs") as crew:
            summary = Demo(crew, folder, plan, console).run()
        text = json.dumps(summary.as_json(), indent=2)
        (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        print_summary(summary, folder, time.monotonic() - began_s, console, options.codec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code (docs/exit-codes.md)."""
    options = _options(arguments)
    os.environ.update(no_grpc_proxy=LOOPBACK)  # what stays on this machine needs no proxy, whatever is configured
    try:
        _run(options)
    except (Stopped, KeyboardInterrupt) as stopped:
        Console(stderr=True).show_cursor()  # the live view may have been cut short
        print("stopped; every process has ended", file=sys.stderr)
        return 128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)
    except ChildFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return failed.exit_code
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
