"""A federation of real processes: the commands `fedserver` and `fedclient` in folders and on ports of their own.

Nothing sleeps. What a process says (its log, its ready line, the server's status stream) tells when to go on, every
wait has a deadline, and leaving the block kills what is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.request import urlopen

from fedclient.identity import ClientIdentity
from fedcore.jobfile import Job, parse_job
from fedserver.cli.connect import operator
from fedserver.rpc.operator_client import OperatorClient

DEADLINE_S = 60.0

Tree = dict[str, Any]


def command(program: str) -> str:
    """Return the path of an installed command, of the Python that runs the tests."""
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found is not None, f"{program} is not installed"
    return found


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on.

    They lie below those that the system gives to outgoing connections. Else a client that dials a server which is down
    could be given the server's port as its own, and so keep it from starting again.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        first_ephemeral = int(file.read().split()[0])
    found: list[int] = []
    for port in range(first_ephemeral - 1 - os.getpid() % 10_000, 1024, -1):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


class Process:
    """A command that runs, and what it has said so far."""

    def __init__(
        self, *arguments: str | Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.out: list[str] = []
        self.err: list[str] = []
        self._news = threading.Condition()
        self._popen = subprocess.Popen(
            [command(self.arguments[0]), *self.arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "400", **(environment or {})},
        )
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self._popen.stdout, self.out), (self._popen.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def events(self, event: str, **fields: object) -> list[Tree]:
        """Return the entries of its log so far that have this text and these fields."""
        entries = [json.loads(line) for line in list(self.err) if line.startswith("{")]
        wanted = {"event": event, **fields}
        return [entry for entry in entries if wanted.items() <= entry.items()]

    def wait_for_event(self, event: str, *, count: int = 1, deadline_s: float = DEADLINE_S, **fields: object) -> Tree:
        """Return the `count`-th such entry of its log, as soon as it is there."""
        self._wait(lambda: len(self.events(event, **fields)) >= count, f"{event} {fields}", deadline_s)
        return self.events(event, **fields)[count - 1]

    def wait_for_line(self, text: str = "", *, deadline_s: float = DEADLINE_S) -> str:
        """Return the first line of standard output that holds `text`, as soon as it is there."""
        self._wait(lambda: any(text in line for line in self.out), f"a line with {text!r}", deadline_s)
        return next(line for line in self.out if text in line)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Return the exit code, once it has ended and all that it said has been read."""
        try:
            code = self._popen.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still runs after {deadline_s} s: {self.story()}") from error
        for reader in self._readers:
            reader.join(deadline_s)
        for pipe in (self._popen.stdout, self._popen.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM, deadline_s: float = DEADLINE_S) -> int:
        """Send a signal and return the exit code; negative if it was not handled."""
        self.send(number)
        return self.wait(deadline_s)

    def kill(self) -> None:
        """End it as a power cut would, and wait until it is gone."""
        assert self.stop(signal.SIGKILL) == -signal.SIGKILL, self.story()

    def discard(self) -> None:
        """Make sure that it is gone, whatever it was doing."""
        if self.is_running:
            self.send(signal.SIGKILL)
        self.wait()

    def story(self) -> str:
        """Return what it was and said, for the message of a failed test."""
        said = "\n".join([*self.out[-20:], *self.err[-40:]])
        return f"{' '.join(self.arguments)} -> {self._popen.returncode}\n{said}"

    def _read(self, pipe: IO[str], lines: list[str]) -> None:
        for line in pipe:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _wait(self, met: Callable[[], bool], what: str, deadline_s: float) -> None:
        end_s = time.monotonic() + deadline_s
        with self._news:
            while not met():
                left_s = end_s - time.monotonic()
                is_over = left_s <= 0 or not any(reader.is_alive() for reader in self._readers)
                assert not is_over, f"{what}: never, from {self.story()}"
                # A reader's last act is to notify; it may still be alive when that is heard.
                self._news.wait(min(left_s, 1.0))


def run(*arguments: str | Path, folder: Path | None = None, deadline_s: float = DEADLINE_S) -> Process:
    """Run a command to its end; `wait` gives its exit code."""
    process = Process(*arguments, folder=folder)
    try:
        process.wait(deadline_s)
    except AssertionError:
        process.discard()
        raise
    return process


class Deployment:
    """A federation in a folder. Use it as a context manager; the server runs once `start_server` was called.

    Attributes:
        environment: added to that of the tests, for the server.
        server: the newest server process.
        clients: the newest process of each client, by name.
    """

    def __init__(self, folder: Path, federation: str = "tests", environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.federation = federation
        self.environment = environment or {}
        self.server: Process
        self.clients: dict[str, Process] = {}
        self.ready: Tree = {}
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        port, enrolment_port = free_ports(2)
        ports = ("--port", str(port), "--enrolment-port", str(enrolment_port), "--metrics-port", "0")
        made = run("fedserver", "init", "--folder", self.state, "--federation", self.federation, *ports)
        assert made.wait() == 0, made.story()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.discard()
        if error is not None:
            for process in self._processes:
                print(process.story())  # noqa: T201 - pytest shows it with the failure

    @property
    def state(self) -> Path:
        """The server's state folder."""
        return self.folder / "server"

    def home(self, name: str) -> Path:
        """Where a client keeps its identity."""
        return self.folder / name

    # -- processes ---------------------------------------------------------------------------------------------------

    def start(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Process:
        """Start any command; it does not outlive the deployment."""
        process = Process(*arguments, folder=self.folder, environment=environment)
        self._processes.append(process)
        return process

    def start_server(self, *under: str) -> Process:
        """Start the server, or start it again on the same state folder and ports, and wait until it is ready.

        Args:
            under: a command that runs the server in its own place, such as `strace -D`.
        """
        options = ("--folder", self.state, "--host", "127.0.0.1", "--json", "--log-format", "json")
        self.server = self.start(*under, command("fedserver"), "run", *options, environment=self.environment)
        self.ready = json.loads(self.server.wait_for_line("{"))
        return self.server

    def start_client(
        self, name: str, data: Mapping[str, object] | None = None, task_files: Sequence[Path] = ()
    ) -> Process:
        """Start a client, enrolled if it is not yet; `wait_for_event("connected")` tells when it is there."""
        if not self.home(name).exists():
            self.enrol(name)
        options = [part for key, value in (data or {}).items() for part in ("--data", f"{key}={value}")]
        files = [part for path in task_files for part in ("--task-file", str(path))]
        process = self.start("fedclient", "run", "--folder", self.home(name), "--log-format", "json", *options, *files)
        self.clients[name] = process
        return process

    def start_digits_clients(self, number: int) -> list[Process]:
        """Start clients as `fedsim run --clients NUMBER` would have them, and wait until they are connected."""
        started = [
            self.start_client(f"client-{shard + 1}", {"shard": shard, "num_shards": number}) for shard in range(number)
        ]
        for process in started:
            process.wait_for_event("connected")
        return started

    # -- the operator ------------------------------------------------------------------------------------------------

    @contextmanager
    def operator(self) -> Iterator[OperatorClient]:
        with operator(self.state) as client:
            yield client

    def enrol(self, name: str, *options: str) -> ClientIdentity:
        """Enrol a client with the real command, and return what that has left in its folder."""
        with self.operator() as server:
            token = server.issue_token(name, 600)
        enrolled = run("fedclient", "enroll", "--token", token, "--folder", self.home(name), *options)
        assert enrolled.wait() == 0, enrolled.story()
        return ClientIdentity.load(self.home(name))

    def submit(self, job: Job) -> str:
        with self.operator() as server:
            return server.submit(job.to_json()).job_id

    def metrics(self) -> str:
        """Return what Prometheus would scrape now."""
        with urlopen(self.ready["metrics_url"], timeout=DEADLINE_S) as answer:
            text: str = answer.read().decode()
        return text

    def status(self, job_id: str) -> Tree:
        with self.operator() as server:
            found: Tree = server.status(job_id)["jobs"][0]
        return found

    def history(self, job_id: str) -> list[Tree]:
        """Return a row for each version of a job."""
        with self.operator() as server:
            return server.version(job_id).history

    def wait_for(self, job_id: str, met: Callable[[Tree], bool], deadline_s: float = DEADLINE_S) -> Tree:
        """Return a job's status as soon as it is as wanted; it must stay so for a moment to be seen for certain."""
        end_s = time.monotonic() + deadline_s
        job: Tree = {}
        with self.operator() as server:
            for state in server.watch(job_id):
                (job,) = state["jobs"]
                if met(job):
                    return job
                assert job["status"] == "running", f"ended too early: {job}\n{self.server.story()}"
                assert time.monotonic() < end_s, f"not within {deadline_s} s: {job}\n{self.server.story()}"
        raise AssertionError("a watch has no end")

    def finish(self, job_id: str, deadline_s: float = DEADLINE_S) -> list[Tree]:
        """Wait until a job has finished and return its history."""
        self.wait_for(job_id, lambda job: bool(job["status"] == "finished"), deadline_s)
        return self.history(job_id)


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Run a federation with a server in the block."""
    with Deployment(folder) as deployment:
        deployment.start_server()
        yield deployment


def digits_job(name: str, *, rounds: int = 2, cohort: int = 3, **sections: Mapping[str, object]) -> Job:
    """Return a short job on the digits; `schedule` and other sections add to, or take the place of, what is here."""
    schedule = {"cohort": cohort, "quorum": cohort, "deadline_s": 120.0, **sections.pop("schedule", {})}
    tree: dict[str, object] = {
        "job": {"name": name, "rounds": rounds, "seed": 7},
        "task": {"name": "digits"},
        "adapter": {"name": "lora", "rank": 4, "dropout": 0.1},
        "training": {"local_epochs": 1, "batch_size": 32, "learning_rate": 0.002},
        "schedule": schedule,
    }
    return parse_job(tree | sections, name)


def bytes_of(history: Sequence[Tree]) -> list[tuple[object, ...]]:
    """Return what must be the same wherever a job runs: each version's bytes, and what went into and came out of it."""
    keys = ("version", "sha256", "num_updates", "num_examples", "evaluation")
    return [tuple(row[key] for key in keys) for row in history]
