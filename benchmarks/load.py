"""How many updates a server core takes: `python -m benchmarks.load --clients 256 --rounds 12`.

A real `fedserver`, and a few processes that hold many clients, each with a connection of its own. The figure is updates
accepted (durable, folded, acknowledged) for a second of the server's processor time: assignments with their
version, rounds and versions are included, the clients' share of the machine is not. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from benchmarks import machine, processes
from benchmarks.deployment import cpu_of, deployed, echo_job
from benchmarks.processes import MIB


def measure(update_kib: int, num_clients: int, rounds: int, client_processes: int) -> dict[str, Any]:
    """Run one job and return its figures."""
    load = machine.load()
    with deployed(num_clients) as server:
        per_process = -(-num_clients // client_processes)
        clients = server.start_clients("benchmarks.load_client", per_process)
        server_s, clients_s = processes.cpu_s(server.pid), cpu_of(clients)
        began_s = time.time()
        history = server.run(echo_job(update_kib * 256, num_clients, rounds))
        server_s, clients_s = processes.cpu_s(server.pid) - server_s, cpu_of(clients) - clients_s
        peak_bytes = processes.peak_bytes(server.pid)
    accepted = sum(row["num_updates"] for row in history)
    wall_s = history[-1]["created_at"] - began_s
    return {
        "update_kib": update_kib,
        "clients": num_clients,
        "client_processes": len(clients),
        "rounds": rounds,
        "accepted": accepted,
        "accepted_per_server_core_s": round(accepted / server_s),
        "accepted_per_s": round(accepted / wall_s),
        "server_cpu_s": round(server_s, 2),
        "clients_cpu_s": round(clients_s, 2),
        "wall_s": round(wall_s, 2),
        "server_peak_mib": round(peak_bytes / MIB, 1),
        "load_before": load,
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--update-kib", type=int, default=64)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--client-processes", type=int, default=2)
    options = parser.parse_args()
    figures = measure(options.update_kib, options.clients, options.rounds, options.client_processes)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
