"""Where the server's processor time of a round goes: `python -m benchmarks.breakdown --model-kib 64 --clients 16`.

Three measurements of the same traffic: a server with clocks in it (`timed_server.py`) under echo clients; the bare
server (`bare_server.py`) without TLS, which is what gRPC and protobuf take for these bytes; the bare server with mutual
TLS, whose surplus is the row TLS. What no row explains is the last row: it is mostly Python between gRPC and the rows.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine, processes
from benchmarks.deployment import deployed, echo_job, start
from benchmarks.timed_server import ROWS

REST = "everything else"


def measure(model_kib: int, num_clients: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each row for one round."""
    load = machine.load()
    with tempfile.TemporaryDirectory(prefix="roundtable-bench-") as folder:
        clocks = Path(folder) / "clocks"
        with deployed(num_clients, ("-m", "benchmarks.timed_server", str(clocks))) as server:
            server.start_clients("benchmarks.echo_client", -(-num_clients // 4))
            server.run(echo_job(model_kib * 256, num_clients, rounds))
            wire = _wire(server.folder / "state", server.homes, model_kib * 1024, rounds)
        lines = [json.loads(line) for line in clocks.read_text(encoding="ascii").splitlines()]
    first, last = lines[1], lines[-1]  # from the end of version 1 to the end of the last one: whole rounds
    whole_rounds = len(lines) - 2

    def per_round_ms(key: str, row: str) -> float:
        return float(last[key].get(row, 0.0) - first[key].get(row, 0.0)) * 1000 / whole_rounds

    cpu_ms = {"wire": wire["plain"], "TLS": wire["secure"] - wire["plain"]}
    cpu_ms |= {row: per_round_ms("cpu_s", row) for row in ROWS}
    total_ms = (last["process_cpu_s"] - first["process_cpu_s"]) * 1000 / whole_rounds
    cpu_ms[REST] = total_ms - sum(cpu_ms.values())
    return {
        "model_kib": model_kib,
        "clients": num_clients,
        "rounds": rounds,
        "wall_ms": round((last["at_s"] - first["at_s"]) * 1000 / whole_rounds, 1),
        "cpu_ms": round(total_ms, 1),
        "rows_cpu_ms": {row: round(value, 2) for row, value in cpu_ms.items()},
        "rows_wall_ms": {row: round(per_round_ms("wall_s", row), 2) for row in ROWS},
        "rows_calls": {
            row: round((last["calls"].get(row, 0) - first["calls"].get(row, 0)) / whole_rounds, 1) for row in ROWS
        },
        "threads_cpu_ms": {
            name: round(per_round_ms("threads_s", name), 1)
            for name in sorted(last["threads_s"], key=lambda name: -per_round_ms("threads_s", name))
            if per_round_ms("threads_s", name) >= 0.01 * total_ms
        },
        "load_before": load,
    }


def _wire(state: Path, homes: list[Path], num_bytes: int, rounds: int) -> dict[str, float]:
    """Return the bare server's milliseconds of processor time for the bytes of one round, without and with TLS."""
    found = {}
    with ExitStack() as stack:
        bare = start(stack, sys.executable, "-m", "benchmarks.bare_server", state)
        assert bare.stdout is not None
        ports = json.loads(bare.stdout.readline())
        for kind, prefix in (("plain", "plain:"), ("secure", "")):
            spent = []
            for some_rounds in (2, 2 + rounds):  # the difference: without connecting, and without warming up
                before_s = processes.cpu_s(bare.pid)
                command = ("-m", "benchmarks.wire_client", prefix + ports[kind], str(num_bytes), str(some_rounds))
                subprocess.run([sys.executable, *command, *homes], check=True)
                spent.append(processes.cpu_s(bare.pid) - before_s)
            found[kind] = (spent[1] - spent[0]) * 1000 / rounds
    return found


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model-kib", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    sys.stdout.write(json.dumps(measure(options.model_kib, options.clients, options.rounds)) + "\n")


if __name__ == "__main__":
    main()
