"""Every case, one after the other: `python -m benchmarks.suite`. Takes about half an hour.

Writes one JSON object a line: first the machine, then a case each, with the command that measured it. A case that fails
is a line too, and makes the exit status 1; one that needs more memory than is free is skipped and says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import machine
from benchmarks.peers import flower
from benchmarks.peers.install import install

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results.jsonl"
LIMIT_S: Final = 1200.0


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        group: who or what is measured.
        name: of the case within the group; cases of one name are compared.
        command: what `python -m` runs.
        needs_gib: memory that must be free.
    """

    group: str
    name: str
    command: str
    needs_gib: float = 1.0


def _rounds(kib: int, clients: int, rounds: int, per_process: int = 1) -> str:
    return (
        f"benchmarks.rounds --model-kib {kib} --clients {clients} --rounds {rounds} --clients-per-process {per_process}"
    )


def _flower(path: str, kib: int, clients: int, rounds: int) -> str:
    return f"benchmarks.peers.flower {path} --model-kib {kib} --clients {clients} --rounds {rounds}"


CASES: Final = (
    Case("ours", "1 MiB × 4", _rounds(1024, 4, 100)),
    Case("legacy", "1 MiB × 4", _flower("legacy", 1024, 4, 100)),
    Case("runtime", "1 MiB × 4", _flower("runtime", 1024, 4, 5), 3),
    Case("ours", "32 MiB × 4", _rounds(32 << 10, 4, 10), 3),
    Case("legacy", "32 MiB × 4", _flower("legacy", 32 << 10, 4, 10), 5),
    Case("runtime", "32 MiB × 4", _flower("runtime", 32 << 10, 4, 4), 5),
    Case("ours", "128 MiB × 4", _rounds(128 << 10, 4, 6), 5),
    Case("legacy", "128 MiB × 4", _flower("legacy", 128 << 10, 4, 6), 14),
    Case("runtime", "128 MiB × 4", _flower("runtime", 128 << 10, 4, 4), 10),
    Case("ours", "128 MiB × 16", _rounds(128 << 10, 16, 3), 14),
    Case("ours", "512 MiB × 1", _rounds(512 << 10, 1, 5), 6),
    Case("legacy", "512 MiB × 1", _flower("legacy", 512 << 10, 1, 4), 14),
    Case("runtime", "512 MiB × 1", _flower("runtime", 512 << 10, 1, 3), 13),
    Case("ours", "512 MiB × 4", _rounds(512 << 10, 4, 3), 14),
    Case("ours", "64 KiB × 16", _rounds(64, 16, 100), 3),
    Case("legacy", "64 KiB × 16", _flower("legacy", 64, 16, 200), 4),
    Case("runtime", "64 KiB × 16", _flower("runtime", 64, 16, 3), 9),
    Case("ours", "64 KiB × 128", _rounds(64, 128, 40), 12),
    Case("ours", "64 KiB × 128, 8 processes", _rounds(64, 128, 40, 16), 3),
    Case("legacy", "64 KiB × 128", _flower("legacy", 64, 128, 20), 18.5),
    Case("load", "64 KiB from 256 connections", "benchmarks.load --update-kib 64 --clients 256 --rounds 20", 3),
    Case("idle", "1000 clients", "benchmarks.idle --clients 1000", 3),
    Case("idle", "5000 clients", "benchmarks.idle --clients 5000", 5),
    Case("breakdown", "64 KiB × 16", "benchmarks.breakdown --model-kib 64 --clients 16 --rounds 100", 3),
    Case("breakdown", "128 MiB × 4", "benchmarks.breakdown --model-kib 131072 --clients 4 --rounds 6", 5),
)


def run(case: Case) -> dict[str, Any]:
    """Return a case's figures, or why there are none."""
    line = {"group": case.group, "case": case.name, "command": f"python -m {case.command}"}
    free_gib = machine.free_gib()
    if free_gib < case.needs_gib:
        return {**line, "skipped": f"needs about {case.needs_gib:g} GiB of memory, {free_gib:.1f} were free"}
    command = [sys.executable, "-m", *case.command.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True, cwd=HERE.parent)
    except subprocess.TimeoutExpired:
        return {**line, "failed": f"not done within {LIMIT_S:g} s"}
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        last = (error.stderr.strip().splitlines() or ["no words"])[-1]
        return {**line, "failed": f"exit status {error.returncode}: {last}"}
    return {**line, **json.loads(done.stdout)}


def main() -> None:
    """Read the options and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, overwritten")
    parser.add_argument("--only", nargs="+", metavar="GROUP", choices=sorted({case.group for case in CASES}))
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only is None or case.group in options.only]
    install()
    is_failed = False
    with options.out.open("w", encoding="utf-8") as file:
        about = {"group": "machine", **machine.describe(), "flower": flower.version()}
        file.write(json.dumps(about, ensure_ascii=False) + "\n")
        for case in chosen:
            line = json.dumps(found := run(case), ensure_ascii=False)
            is_failed = is_failed or "failed" in found
            for stream in (file, sys.stdout):
                stream.write(line + "\n")
                stream.flush()
    sys.exit(is_failed)


if __name__ == "__main__":
    main()
