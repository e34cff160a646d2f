"""Seconds of a round with echo clients: `python -m benchmarks.rounds --model-mib 32 --clients 4 --rounds 8`.

A real `fedserver` with mutual TLS and durable acknowledgement, and client processes, on loopback. Prints one JSON
object: the median over all rounds but the first, the extremes, and the server's peak memory and CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.echo_client import TASK
from fedclient.enroll import enroll
from fedcore.clock import SystemClock
from fedcore.identity import EnrolmentToken
from fedcore.jobfile import Job, parse_job
from fedserver.cli.connect import operator
from fedserver.rpc.operator_client import OperatorClient

MIB = 1 << 20


def measure(model_mib: float, num_clients: int, rounds: int, clients_per_process: int) -> dict[str, Any]:
    """Run one job and return its figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        state = folder / "state"
        ports = ("--port", "0", "--enrolment-port", "0")
        subprocess.run(
            [_command("fedserver"), "init", "--folder", state, *ports], check=True, stdout=subprocess.DEVNULL
        )
        server = _start(
            stack, "fedserver", "run", "--folder", state, "--json", "--metrics-port", "0", "--log-level", "warning"
        )
        assert server.stdout is not None
        server.stdout.readline()  # it is ready
        with operator(state) as client:
            folders = [_enrol(client, folder, f"client-{number}") for number in range(num_clients)]
            for first in range(0, num_clients, clients_per_process):
                chosen = folders[first : first + clients_per_process]
                _start(stack, sys.executable, "-m", "benchmarks.echo_client", *chosen)
            history = _run(client, _job(model_mib, num_clients, rounds))
        times_s = [row["created_at"] for row in history]
        seconds = [after - before for before, after in pairwise(times_s)]
        return {
            "model_mib": model_mib,
            "clients": num_clients,
            "client_processes": -(-num_clients // clients_per_process),
            "rounds": rounds,
            "median_s": round(statistics.median(seconds[1:]), 4),
            "min_s": round(min(seconds[1:]), 4),
            "max_s": round(max(seconds[1:]), 4),
            "server_peak_mib": round(_peak_bytes(server.pid) / MIB),
            "server_cpu_s": _cpu_s(server.pid),
        }


def _job(model_mib: float, num_clients: int, rounds: int) -> Job:
    return parse_job(
        {
            "job": {"name": "echo", "rounds": rounds},
            "task": {"name": TASK, "num_values": int(model_mib * MIB / 4)},
            "schedule": {"cohort": num_clients},
        },
        "benchmark",
    )


def _run(client: OperatorClient, job: Job) -> list[dict[str, Any]]:
    job_id = client.submit(job.to_json()).job_id
    for status in client.watch(job_id):
        if status["jobs"][0]["status"] != "running":
            break
    if status["jobs"][0]["status"] != "finished":
        raise SystemExit(f"the job {status['jobs'][0]['status']}: {status['jobs'][0]['failure']}")
    return client.version(job_id).history


def _enrol(client: OperatorClient, folder: Path, name: str) -> Path:
    token = EnrolmentToken.decode(client.issue_token(name, 600))
    asyncio.run(enroll(token, folder / name, SystemClock()))
    return folder / name


def _start(stack: ExitStack, *command: str | Path) -> subprocess.Popen[str]:
    arguments = [_command(str(command[0])), *map(str, command[1:])]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def _command(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found is not None, f"{name} is not installed"
    return found


def _peak_bytes(pid: int) -> int:
    """Return the process's peak resident memory (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model-mib", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clients-per-process", type=int, default=1)
    options = parser.parse_args()
    figures = measure(options.model_mib, options.clients, options.rounds, options.clients_per_process)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
