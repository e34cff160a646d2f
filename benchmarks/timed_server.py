"""`fedserver` with clocks in it: `python -m benchmarks.timed_server FILE run ...`, then the server's own arguments.

It measures the processor and the wall time of the functions below, each on the thread that runs it, and appends to the
file after each version, as one line of JSON, what has added up so far. A function that has moved is an error, not a row
of zeros.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import processes
from fedserver.cli import main

R = TypeVar("R")

# Row of the table: where its time is spent. What one of these functions calls counts in its row.
ROWS = {
    "frames to disk, SHA-256": (
        "fedserver.rounds.intake:Intake._put",
        "fedserver.state.blobs:FolderSpool.append",
        "fedserver.state.blobs:FolderSpool.seal",
    ),
    "journal (small frames too)": ("fedserver.state.sqlite:SqliteStore.write",),
    "headers and signatures": (
        "fedcore.messages:UpdateHeader.from_bytes",
        "fedserver.rounds.intake:check_signature",
        "fedserver.rounds.intake:check_header",
    ),
    "decode and check": ("fedserver.rounds.intake:check_frame",),
    "fold (decodes too)": ("fedagg.weighted_mean:FixedPointFold.add",),
    "version write": ("fedserver.rounds.engine:write_version",),
    "scheduling and assignment": (
        "fedserver.rounds.scheduler:Scheduler.step",
        "fedserver.rounds.fleet:Fleet.take",
        "fedserver.rounds.fleet:Fleet.order",
        "fedserver.rounds.fleet:Fleet.release",
    ),
}
VERSION_WRITE = "version write"


class Clocks:
    """Adds up, over all threads."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._running = threading.local()
        self._lock = threading.Lock()
        self._cpu_s: dict[str, float] = defaultdict(float)
        self._wall_s: dict[str, float] = defaultdict(float)
        self._calls: dict[str, int] = defaultdict(int)

    def timed(self, row: str, function: Callable[..., R]) -> Callable[..., R]:
        """Return `function` with clocks."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            if getattr(self._running, "row", None) is not None:
                return function(*args, **kwargs)
            self._running.row = row
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._running.row = None
                cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
                with self._lock:
                    self._cpu_s[row] += cpu_s
                    self._wall_s[row] += wall_s
                    self._calls[row] += 1
                if row == VERSION_WRITE:
                    self.report()

        return wrapper

    def report(self) -> None:
        """Write down what has added up, and the processor time of each thread."""
        threads: dict[str, float] = defaultdict(float)
        python = {thread.native_id: thread.name for thread in threading.enumerate()}
        for native_id, (name, cpu_s) in processes.thread_cpu_s().items():
            kind = python.get(native_id, f"native {name}")
            threads["worker" if kind.startswith("worker") else kind] += cpu_s
        with self._lock:
            tree = {"cpu_s": self._cpu_s, "wall_s": self._wall_s, "calls": self._calls, "threads_s": threads}
            line = json.dumps({"at_s": time.time(), "process_cpu_s": time.process_time(), **tree})
        with self._file.open("a", encoding="ascii") as file:
            file.write(line + "\n")


def install(clocks: Clocks) -> None:
    """Put clocks into every function of `ROWS`."""
    for row, places in ROWS.items():
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            raw = vars(owner)[name]
            if isinstance(raw, staticmethod):
                setattr(owner, name, staticmethod(clocks.timed(row, raw.__func__)))
            else:
                setattr(owner, name, clocks.timed(row, raw))


if __name__ == "__main__":
    install(Clocks(Path(sys.argv.pop(1))))
    main()
