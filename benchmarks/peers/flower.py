"""Seconds of a round of Flower with echo clients, as `benchmarks.rounds` measures ours.

`python -m benchmarks.peers.flower legacy --model-kib 1024 --clients 4 --rounds 20`: `start_server`/`start_client`, gRPC
without TLS. `... runtime ...`: SuperLink, SuperNodes and an app, HTTP without TLS. Prints one JSON object. Telemetry
and the check for updates are off.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

from benchmarks import machine, processes
from benchmarks.deployment import end
from benchmarks.peers.install import HERE, VENV, install
from benchmarks.processes import MIB, Family
from benchmarks.rounds import times

APP = HERE / "flower_app"
LIMIT_S = 900.0
POLL_S = 0.02


def measure(path: str, model_kib: int, num_clients: int, rounds: int) -> dict[str, Any]:
    """Run one federation and return its figures.

    Args:
        path: "legacy" or "runtime".
        model_kib: size of the model.
        num_clients: processes, or SuperNodes with their processes.
        rounds: how many; the first one is not timed.
    """
    load = machine.load()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roundtable-bench-")))
        peer = _Peer(stack, folder)
        run = _legacy if path == "legacy" else _runtime
        spent = run(peer, model_kib * 256, num_clients, rounds)
        ends_s = peer.ends_s()
    updates = spent.rounds * num_clients
    return {
        "model_kib": model_kib,
        "clients": num_clients,
        "rounds": rounds,
        **times([0.0, *ends_s], num_clients),  # the first version was there before
        "server_peak_mib": round(spent.server_peak_bytes / MIB, 1),
        "server_cpu_ms_per_update": round(spent.server_cpu_s * 1000 / updates, 2),
        "clients_cpu_ms_per_update": round(spent.clients_cpu_s * 1000 / updates, 2),
        "clients_peak_mib": round(spent.clients_peak_bytes / MIB),
        "times_ideal_bytes": round(spent.moved_bytes / (2 * updates * model_kib * 1024), 2),
        "load_before": load,
    }


def version() -> str:
    """Return the version that is installed."""
    (found,) = VENV.glob("lib/python*/site-packages/flwr-*.dist-info")
    return PathDistribution(found).version


class _Peer:
    """Starts the peer's commands in their environment, with a home of their own."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.bin, self.folder, self.times_file = install(), folder, folder / "times"
        self._stack = stack
        self._environment = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        (folder / "home").mkdir()
        self.times_file.touch()

    def start(self, *command: str | Path | int) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.folder / f"{time.monotonic_ns()}.log").open("wb"))
        process = subprocess.Popen(
            [self.bin / str(command[0]), *map(str, command[1:])],
            env=self._environment, cwd=self.folder, stdout=log, stderr=log,
        )  # fmt: skip
        self._stack.callback(end, process)
        return process

    def ends_s(self) -> list[float]:
        """Return when each round so far ended."""
        return [float(line) for line in self.times_file.read_text(encoding="ascii").splitlines()]

    def watch(self, process: subprocess.Popen[bytes], server: int, clients: list[int], rounds: int) -> _Spent:
        """Wait until the rounds are over, and return what they cost; what came before the first one ended is left out.

        Raises:
            SystemExit: `process` failed, or it takes too long; the logs are printed.
        """
        until_s = time.monotonic() + LIMIT_S
        with Family([server]) as servers, Family(clients) as family:
            before = None
            while (done := len(self.ends_s())) < rounds:
                if before is None and done:
                    before = done, servers.cpu_s, family.cpu_s, processes.loopback_bytes()
                if time.monotonic() > until_s or process.poll() not in (None, 0):
                    for log in sorted(self.folder.glob("*.log")):
                        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-3000:])
                    raise SystemExit(f"{process.args!r} failed, or was not done in {LIMIT_S:g} s")
                time.sleep(POLL_S)
            assert before is not None, "all rounds were over at the first look: ask for more rounds"
            after = rounds, servers.cpu_s, family.cpu_s, processes.loopback_bytes()
        return _Spent(
            rounds=after[0] - before[0],
            server_cpu_s=after[1] - before[1],
            clients_cpu_s=after[2] - before[2],
            moved_bytes=after[3] - before[3],
            server_peak_bytes=servers.peak_bytes,
            clients_peak_bytes=family.peak_bytes,
        )


@dataclass(frozen=True)
class _Spent:
    """What some rounds cost; memory is the peak since the start, all processes of a side together."""

    rounds: int
    server_cpu_s: float
    clients_cpu_s: float
    moved_bytes: int
    server_peak_bytes: int
    clients_peak_bytes: int


def _legacy(peer: _Peer, num_values: int, num_clients: int, rounds: int) -> _Spent:
    port = _free_port()
    server = peer.start("python", HERE / "legacy_server.py", port, num_clients, rounds, num_values, peer.times_file)
    _wait_for_port(port)  # clients give up at once when nobody is there
    clients = [peer.start("python", HERE / "legacy_client.py", port).pid for _ in range(num_clients)]
    return peer.watch(server, server.pid, clients, rounds)


def _runtime(peer: _Peer, num_values: int, num_clients: int, rounds: int) -> _Spent:
    port = _free_port()
    connection = f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (peer.folder / "home" / "config.toml").write_text(connection, encoding="ascii")
    link = peer.start("flower-superlink", "--insecure", "--port", port, "--disable-runtime-dependency-installation")
    _wait_for_port(port)
    nodes = [
        peer.start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", _free_port()).pid
        for _ in range(num_clients)
    ]
    values = {"num-values": num_values, "num-clients": num_clients, "rounds": rounds}
    config = " ".join(f"{key}={value}" for key, value in values.items()) + f' times-file="{peer.times_file}"'
    run = peer.start("flwr", "run", APP, "bench", "--run-config", config)
    return peer.watch(run, link.pid, nodes, rounds)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int) -> None:
    end_s = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)
        else:
            return


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("path", choices=["legacy", "runtime"])
    parser.add_argument("--model-kib", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    figures = measure(options.path, options.model_kib, options.clients, options.rounds)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
