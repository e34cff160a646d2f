"""Coverage-guided fuzzing of everything that reads hostile or damaged bytes.

    python -m tests.fuzz.run                          every target, ten minutes each
    python -m tests.fuzz.run frame header --seconds 60
    python -m tests.fuzz.run frame FILE               read one input again, with its traceback

Run at the repository's root. `.fuzz/TARGET/` keeps what was learnt (`corpus/`) and what broke something (`crashes/`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / ".fuzz"
STARTING_S: Final = 120
_FAST: Final = Path("/dev/shm")  # files to damage are small and many


@dataclass(frozen=True)
class Outcome:
    """What one target's run came to.

    Attributes:
        runs: inputs that were read.
        coverage: of the seeds, and in the end: edges in instrumented code.
        failure: empty, or what broke: traceback, input and the command that reads it again.
    """

    target: str
    runs: int
    coverage: tuple[int, int]
    failure: str

    def __str__(self) -> str:
        before, after = self.coverage
        return f"{self.target:12} {self.runs:9} inputs, coverage {before} -> {after}{self.failure and ', FAILED'}"


def fuzz(target: str, seconds: int, folder: Path = FOLDER, *, runs: int = -1, seed: int = 0) -> Outcome:
    """Fuzz one target in a process of its own, for `seconds`, that many `runs`, or until something breaks.

    Args:
        target: its name.
        seconds: at most, after starting.
        folder: for corpus and crashes.
        runs: inputs to read; -1 for no bound.
        seed: with an empty folder the same one gives the same inputs again; 0 for new ones.
    """
    options = [f"-max_total_time={seconds}", f"-runs={runs}", f"-seed={seed}"]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_FAST if os.access(_FAST, os.W_OK) else None) as scratch:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.fuzzer", target, str(folder / target), *options],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": scratch, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, _ = process.communicate(timeout=seconds + STARTING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    said = output.decode(errors="replace")
    coverage = [int(edges) for edges in re.findall(r"^#\d+\s+\w+\s+cov: (\d+)", said, re.MULTILINE)]
    executed = re.findall(r"^stat::number_of_executed_units: (\d+)", said, re.MULTILINE)
    failure = "" if process.returncode == 0 else explain(target, said)
    return Outcome(
        target, int(executed[0]) if executed else 0, (coverage[0], coverage[-1]) if coverage else (0, 0), failure
    )


def explain(target: str, said: str) -> str:
    """Return what a person needs to see the failure again."""
    found = re.search(r"Test unit written to (.+)", said)
    if found is None:
        return said[-5000:]
    path = Path(found[1].strip())
    data = path.read_bytes()
    traceback = re.search(r"=== Uncaught Python exception: ===\n(.*?)\n==\d+==", said, re.DOTALL)
    again = f"python -m tests.fuzz.run {target} {path}\n"
    return f"{traceback[1] if traceback else said[-5000:]}\n{len(data)} bytes: {data[:300]!r}\nagain: {again}"


def main() -> None:
    """Parse the command line; exit 1 if something broke."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="TARGET|FILE", help=f"targets: {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at once (default: %(default)s)"
    )
    options = parser.parse_args()
    names = [name for name in options.what if name in TARGETS]
    files = [Path(name) for name in options.what if name not in TARGETS]
    if files:
        for name in names:
            for file in files:
                TARGETS[name].read(file.read_bytes())
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda name: fuzz(name, options.seconds), names or TARGETS):
            sys.stdout.write(f"{outcome}\n{outcome.failure}")
            sys.stdout.flush()
            outcomes.append(outcome)
    sys.exit(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    main()
