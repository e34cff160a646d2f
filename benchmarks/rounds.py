"""Seconds of a round with echo clients: `python -m benchmarks.rounds --model-kib 32768 --clients 4 --rounds 8`.

A real `fedserver` with mutual TLS and durable acknowledgement, and client processes, on loopback. Prints one JSON
object: the median over all rounds but the first, the extremes, and what the server cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import pairwise
from typing import Any

from benchmarks import machine, processes
from benchmarks.deployment import cpu_of, deployed, echo_job
from benchmarks.processes import MIB


def measure(model_kib: int, num_clients: int, rounds: int, clients_per_process: int = 1) -> dict[str, Any]:
    """Run one job and return its figures."""
    load = machine.load()
    with deployed(num_clients) as server:
        clients = server.start_clients("benchmarks.echo_client", clients_per_process)
        before_cpu_s, before_clients_s, before_bytes = _spent(server.pid, clients)
        history = server.run(echo_job(model_kib * 256, num_clients, rounds))
        after_cpu_s, after_clients_s, after_bytes = _spent(server.pid, clients)
        peak_bytes = processes.peak_bytes(server.pid)
        clients_peak_bytes = sum(map(processes.peak_bytes, clients))
    # Each round is a download and an upload for each client; besides, one client sends the first version and all
    # download and measure the last one.
    ideal_bytes = (2 * num_clients * rounds + 1 + num_clients) * model_kib * 1024
    return {
        "model_kib": model_kib,
        "clients": num_clients,
        "client_processes": len(clients),
        "rounds": rounds,
        **times([row["created_at"] for row in history], num_clients),
        "server_peak_mib": round(peak_bytes / MIB, 1),
        "server_cpu_ms_per_update": round((after_cpu_s - before_cpu_s) * 1000 / (rounds * num_clients), 2),
        "clients_peak_mib": round(clients_peak_bytes / MIB),
        "clients_cpu_ms_per_update": round((after_clients_s - before_clients_s) * 1000 / (rounds * num_clients), 2),
        "times_ideal_bytes": round((after_bytes - before_bytes) / ideal_bytes, 2),
        "load_before": load,
    }


def times(ends_s: list[float], num_clients: int) -> dict[str, float]:
    """Return the seconds between the ends of rounds: median, extremes, and the clients a second at the median.

    Args:
        ends_s: when each version was made, the first one included: the round after that is the first to be timed.
        num_clients: how many took part in each.
    """
    seconds = [after - before for before, after in pairwise(ends_s[1:])]
    median_s = statistics.median(seconds)
    return {
        "median_s": round(median_s, 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "clients_per_s": round(num_clients / median_s, 2),
    }


def _spent(server: int, clients: list[int]) -> tuple[float, float, int]:
    return processes.cpu_s(server), cpu_of(clients), processes.loopback_bytes()


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model-kib", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clients-per-process", type=int, default=1)
    options = parser.parse_args()
    figures = measure(options.model_kib, options.clients, options.rounds, options.clients_per_process)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
