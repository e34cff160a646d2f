"""A real `fedserver` in a folder of its own, with enrolled clients: mutual TLS, durable acknowledgement, loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.echo_client import TASK
from fedclient.identity import ClientIdentity, new_request
from fedcore.identity import serial_of
from fedcore.jobfile import Job, parse_job
from fedserver.cli.connect import operator
from fedserver.config import ServerConfig
from fedserver.daemon import initialise
from fedserver.rpc.operator_client import OperatorClient
from fedserver.security.authority import Authority
from fedserver.security.certificates import pem
from fedserver.state.folder import StateFolder
from fedserver.state.records import ClientRecord

FEDERATION = "benchmark"
POLL_S = 0.5
START_S = 600.0  # for all client processes to be there: many of them start on few cores


@dataclass
class Deployment:
    """A running server.

    Attributes:
        folder: of everything that this deployment writes; gone with it.
        pid: of the server.
        address: of its main port.
        homes: the clients' identity folders.
        operator: a connection with the operator's certificate.
    """

    folder: Path
    pid: int
    address: str
    homes: list[Path]
    operator: OperatorClient
    _stack: ExitStack = field(repr=False)
    _clients: list[subprocess.Popen[str]] = field(default_factory=list)

    def start_clients(self, module: str, per_process: int) -> list[int]:
        """Start client processes, wait until every client has its session, and return the processes' ids."""
        for first in range(0, len(self.homes), per_process):
            chosen = self.homes[first : first + per_process]
            self._clients.append(start(self._stack, sys.executable, "-m", module, *chosen))
        end_s = time.monotonic() + START_S
        while (connected := self.operator.status()["clients"]["connected"]) < len(self.homes):
            if time.monotonic() > end_s:
                raise SystemExit(f"{connected} of {len(self.homes)} clients came within {START_S:g} s")
            self._wait()
        return [process.pid for process in self._clients]

    def run(self, job: Job) -> list[dict[str, Any]]:
        """Run a job to its end and return a row for each version.

        Raises:
            SystemExit: it failed.
        """
        job_id = self.operator.submit(job.to_json()).job_id
        # Asked now and then: a watch would have the server describe itself after every event.
        while (found := self.operator.status(job_id)["jobs"][0])["status"] == "running":
            self._wait()
        if found["status"] != "finished":
            raise SystemExit(f"the job {found['status']}: {found['failure']}")
        return self.operator.version(job_id).history

    def _wait(self) -> None:
        time.sleep(POLL_S)
        if ended := [process.returncode for process in self._clients if process.poll() is not None]:
            raise SystemExit(f"{len(ended)} client processes ended, with {ended}")


@contextmanager
def deployed(num_clients: int, command: Sequence[str] = ("-m", "fedserver")) -> Iterator[Deployment]:
    """Run a server in the block.

    Args:
        num_clients: how many are enrolled.
        command: what Python runs for a server, before the server's own arguments.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roundtable-bench-")))
        state = folder / "state"
        config = ServerConfig(host="127.0.0.1", port=0, enrolment_port=0, metrics_port=0)
        initialise(state, config, FEDERATION)
        identities = enrol(state, num_clients)
        server = start(stack, sys.executable, *command, "run", "--folder", state, "--json", "--log-level", "warning")
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        homes = []
        for identity in identities:
            homes.append(folder / identity.client)
            replace(identity, server=address).save(homes[-1])
        client = stack.enter_context(operator(state))
        yield Deployment(folder, server.pid, address, homes, client, stack)


def enrol(state: Path, num_clients: int) -> list[ClientIdentity]:
    """Enrol clients straight in the state folder, where no server runs yet: thousands take seconds."""
    identities, records = [], []
    with StateFolder.open(state) as opened:
        authority, now_s = Authority.load(opened.keys), time.time()
        for number in range(num_clients):
            request = new_request(f"client-{number}", FEDERATION)
            certificate = authority.sign_client(request.csr_pem, request.identity.name)
            expires_s = certificate.not_valid_after_utc.timestamp()
            identity = request.complete(pem(certificate), server="localhost:1", ca_pem=authority.ca_pem)
            identities.append(identity)
            records.append(
                ClientRecord(identity.client, serial_of(certificate), request.signing_public_key, now_s, expires_s)
            )
        opened.store.write(records)
    return identities


def echo_job(num_values: int, num_clients: int, rounds: int) -> Job:
    """Return a job whose every version takes an update of each client."""
    return parse_job(
        {
            "job": {"name": "echo", "rounds": rounds},
            "task": {"name": TASK, "num_values": num_values},
            "schedule": {"cohort": num_clients},
        },
        "benchmark",
    )


def start(stack: ExitStack, *command: str | Path) -> subprocess.Popen[str]:
    """Start a process that ends with the stack."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen[Any]) -> None:
    """Stop a process."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def cpu_of(pids: Iterable[int]) -> float:
    """Return the processor seconds of some processes together."""
    return sum(processes.cpu_s(pid) for pid in pids)
