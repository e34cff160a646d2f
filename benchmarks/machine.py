"""What the figures were measured on: the machine, the versions, and how busy it was."""

from __future__ import annotations

import os
import platform
import ssl
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("grpcio", "protobuf", "numpy", "zstandard", "cryptography", "pydantic")


def describe() -> dict[str, Any]:
    """Return the machine, the versions and the date (Linux)."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_gib("MemTotal:"), 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "packages": {name: version(name) for name in ("roundtable", *PACKAGES)},
        "commit": _commit(),
    }


def load() -> float:
    """Return the load average of the last minute: what else the cores had to do."""
    return round(os.getloadavg()[0], 2)


def use_one_core() -> None:
    """Keep this process, and what it starts, on one of the cores that it may use (Linux)."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def free_gib() -> float:
    """Return how much memory a new process could have."""
    return _memory_gib("MemAvailable:")


def _memory_gib(key: str) -> float:
    return next(int(line.split()[1]) / (1 << 20) for line in _lines("/proc/meminfo") if line.startswith(key))


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="ascii", errors="replace").splitlines()


def _commit() -> str:
    """Return the commit, with a mark when the working tree differs from it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(command, check=False, cwd=here, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"
