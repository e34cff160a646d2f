"""Every case, one after the other: `python -m benchmarks.suite`. Takes about forty minutes.

Writes one JSON object a line: first the machine, then a case each, with the command that measured it. A case that fails
is a line too, and makes the exit status 1; one that needs more memory than is free is skipped and says so.

With `--group codecs folding` only these are measured. Their lines take the place of those that the file has of them,
behind a line for the machine as it is now; those of other groups stay with theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterable
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
    Case("codecs", "Gaussian", "benchmarks.codecs --draw gaussian", 2),
    Case("codecs", "Student t", "benchmarks.codecs --draw student-t", 2),
    Case("folding", "16 updates", "benchmarks.folding", 2),
)
PEERS: Final = frozenset({"legacy", "runtime"})
"""Groups that need Flower."""


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


def without(lines: Iterable[dict[str, Any]], groups: Collection[str]) -> list[dict[str, Any]]:
    """Return the lines of other groups, each behind the machine on which it was measured."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["group"] == "machine" and kept and kept[-1]["group"] == "machine":
            kept.pop()
        if line["group"] not in groups:
            kept.append(line)
    return kept[:-1] if kept and kept[-1]["group"] == "machine" else kept


def main() -> None:
    """Read the options and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results; lines of what is measured go")
    groups = sorted({case.group for case in CASES})
    parser.add_argument("--group", nargs="+", choices=groups, default=groups, help="measure these only")
    options = parser.parse_args()
    chosen = [case for case in CASES if case.group in options.group]
    about: dict[str, Any] = {"group": "machine", **machine.describe()}
    if not PEERS.isdisjoint(options.group):
        install()
        about["flower"] = flower.version()
    old = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    kept = without(map(json.loads, old), options.group)
    is_failed = False
    with options.out.open("w", encoding="utf-8") as file:
        for line in (*kept, about):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for case in chosen:
            found = run(case)
            is_failed = is_failed or "failed" in found
            for stream in (file, sys.stdout):
                stream.write(json.dumps(found, ensure_ascii=False) + "\n")
                stream.flush()
    sys.exit(is_failed)


if __name__ == "__main__":
    main()
