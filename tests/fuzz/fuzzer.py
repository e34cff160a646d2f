"""One fuzzing process: `python -m tests.fuzz.fuzzer TARGET FOLDER [OPTION…]`, started by `tests.fuzz.run`.

FOLDER keeps the corpus and crashes of the target; the options are libFuzzer's. It ends as libFuzzer does: 0, or 77 with
the traceback and the crashing input's file on standard error.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import atheris

from tests.fuzz.target import Target

INSTRUMENTED: Final = ["fedagg", "fedclient", "fedcodec", "fedcore", "fedprivacy", "fedserver", "tomllib"]
MEMORY_BYTES: Final = 512 << 20
"""Address space that reading one input may take, far above what any input below the bounds needs."""
CPU_S: Final = 5.0
"""Processor time that reading one input may take: seconds, with instrumentation."""


def main() -> None:
    """Fuzz until libFuzzer has had enough, or an input breaks something."""
    name, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.planted import PLANTED
        from tests.fuzz.targets import TARGETS
    target = PLANTED if name == PLANTED.name else TARGETS[name]
    logging.disable()  # every refusal would be a line
    corpus, crashes, words = Path(folder) / "corpus", Path(folder) / "crashes", Path(folder) / "words"
    seeds = list(target.seeds())
    for made in (corpus, crashes):
        made.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        (corpus / f"seed-{index:03}").write_bytes(seed)
    words.write_text("\n".join(dictionary(seeds)) + "\n", encoding="ascii")
    arguments = [f"-artifact_prefix={crashes}/", f"-dict={words}", f"-max_len={target.max_bytes}"]
    fixed = ["-print_final_stats=1", "-reload=0", "-timeout=60", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *fixed, *arguments, *options, str(corpus)], bounded(target), custom_mutator=mutated)
    limit_memory()
    atheris.Fuzz()


def bounded(target: Target) -> Callable[[bytes], None]:
    """Return the target's reader with a bound on the time that it takes."""

    def read(data: bytes) -> None:
        started_s = time.process_time()
        target.read(data)
        took_s = time.process_time() - started_s
        assert took_s < CPU_S, f"{len(data)} bytes took {took_s:.1f} s of processor time"

    return read


def limit_memory() -> None:
    """Let an allocation by a length that nobody has checked become a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def mutated(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Return `data` changed by libFuzzer; now and then a piece of it comes many times: nesting, long lists, bombs."""
    random = Random(seed)
    if data and random.random() < 0.05:
        start = random.randrange(len(data))
        piece = data[start : start + 1 + int(random.expovariate(0.2))]
        data = data[:start] + piece * (1 << random.randrange(1, 16)) + data[start + len(piece) :]
    return bytes(atheris.Mutate(data[:max_bytes], max_bytes))


def dictionary(seeds: list[bytes]) -> list[str]:
    """Return the words of the seeds, and some signs, as a libFuzzer dictionary."""
    words = {word for seed in seeds for word in re.findall(rb"[A-Za-z_][A-Za-z0-9_.-]{2,30}", seed)}
    signs = {b"null", b"true", b"NaN", b"Infinity", b"1e999", b"-0.0", b"\\ud800", b"\\u0000", b"[[", b"{}", b'""'}
    return ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in sorted(words | signs)]


if __name__ == "__main__":
    main()
