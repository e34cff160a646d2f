"""What processes cost, from /proc (Linux): memory, processor time, bytes on loopback."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

MIB = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the processor time of a process, user and system, all threads."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    return _status(pid, "VmRSS:")


def peak_bytes(pid: int) -> int:
    """Return a process's peak resident memory."""
    return _status(pid, "VmHWM:")


def thread_cpu_s() -> dict[int, tuple[str, float]]:
    """Return the name and the processor time of each thread of this process, by its native id."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        head, _, tail = (folder / "stat").read_text(encoding="ascii").rpartition(")")
        fields = tail.split()
        found[int(folder.name)] = (head.partition("(")[2], (int(fields[11]) + int(fields[12])) / _TICKS)
    return found


def loopback_bytes() -> int:
    """Return how many bytes have gone over loopback since the machine started, headers included, whoever sent them."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.partition(":")[2].split()[0]) for line in lines if line.strip().startswith("lo:"))


class Family:
    """Processes and all that they start: summed processor time, and the peak of their summed memory.

    Sampled every `every_s`; what a process uses in its last moments, between two samples, is missed.
    """

    def __init__(self, roots: Iterable[int], every_s: float = 0.2) -> None:
        self.peak_bytes = 0
        self._roots = list(roots)
        self._every_s = every_s
        self._cpu_s: dict[int, float] = {}  # of every process that was ever seen, as last seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def cpu_s(self) -> float:
        """Processor time of all, up to now."""
        self._sample()
        return sum(self._cpu_s.values())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid in _descendants(self._roots):
            with contextlib.suppress(OSError, StopIteration, IndexError):  # it has just ended
                total += rss_bytes(pid)
                self._cpu_s[pid] = cpu_s(pid)
        self.peak_bytes = max(self.peak_bytes, total)


def _descendants(roots: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                children.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
    found = list(roots)
    for pid in found:
        found += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def _status(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
