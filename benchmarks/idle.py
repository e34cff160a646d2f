"""What idle clients cost: `python -m benchmarks.idle --clients 1000`.

First a real `fedserver`, then the bare server (`bare_server.py`), each with the same clients: mutual TLS, a connection
each, a heartbeat every ten seconds. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine, processes
from benchmarks.deployment import deployed, start
from benchmarks.processes import MIB

WATCHED_S = 20.0  # two heartbeats of each client


def measure(num_clients: int) -> dict[str, Any]:
    """Connect the clients to both servers, one after the other, and return the figures of both."""
    load = machine.load()
    with deployed(num_clients) as server, ExitStack() as stack:
        ours = _cost(server.pid, server.address, server.homes)
        bare = start(stack, sys.executable, "-m", "benchmarks.bare_server", server.folder / "state")
        assert bare.stdout is not None
        floor = _cost(bare.pid, json.loads(bare.stdout.readline())["secure"], server.homes)
    return {
        "clients": num_clients,
        **ours,
        **{f"floor_{name}": value for name, value in floor.items()},
        "times_floor": round(ours["kb_per_client"] / floor["kb_per_client"], 2),
        "load_before": load,
    }


def _cost(pid: int, address: str, homes: list[Path]) -> dict[str, float]:
    before_bytes = processes.rss_bytes(pid)
    with ExitStack() as stack:
        clients = start(stack, sys.executable, "-m", "benchmarks.idle_client", address, *homes)
        assert clients.stdout is not None
        connect_s = float(clients.stdout.readline())
        cpu_s, began_s = processes.cpu_s(pid), time.monotonic()
        time.sleep(WATCHED_S)
        cpu_s, watched_s = processes.cpu_s(pid) - cpu_s, time.monotonic() - began_s
        after_bytes = processes.rss_bytes(pid)
    return {
        "before_mib": round(before_bytes / MIB, 1),
        "after_mib": round(after_bytes / MIB, 1),
        "kb_per_client": round((after_bytes - before_bytes) / len(homes) / 1000, 1),
        "idle_cpu_percent": round(100 * cpu_s / watched_s, 2),
        "connect_s": connect_s,
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=1000)
    sys.stdout.write(json.dumps(measure(parser.parse_args().clients)) + "\n")


if __name__ == "__main__":
    main()
