"""What it saves to fold updates as they are decoded: `python -m benchmarks.folding`.

Sixteen updates go into the weighted mean in two ways: as parts, straight from their frames, which is what the server
does; and each first decoded to one dense vector. Seconds are processor time of one core, decoding included; memory is
what Python and numpy allocate on top of the fold and the frames, at its peak. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.codecs import CHAINS, DRAWS, SEED, spread, tensor_sizes
from benchmarks.processes import MIB
from fedagg.base import Capacity, Fold
from fedagg.weighted_mean import WeightedMean
from fedcodec.build import build_pipeline
from fedcodec.pipeline import Pipeline
from fedcore.allocator import keep_memory
from fedcore.layout import Vector
from fedcore.part import Part, dense_parts

NAMES: Final = ("top-k 1 %", "FedZip", "ComPEFT", "sign", "RQM")
MAX_ABS: Final = 16.0
"""Above every level of the RQM chain, and what a normal draw of these numbers reaches."""


class Updates(NamedTuple):
    """Frames of one pipeline."""

    pipeline: Pipeline
    sizes: Sequence[int]
    frames: list[bytes]


def _as_parts(updates: Updates, frame: bytes) -> Iterable[Part]:
    return updates.pipeline.open(frame, updates.sizes)


def _as_dense(updates: Updates, frame: bytes) -> Iterable[Part]:
    return dense_parts([updates.pipeline.decode(frame, updates.sizes)])


WAYS: Final[Mapping[str, Callable[[Updates, bytes], Iterable[Part]]]] = {"parts": _as_parts, "dense": _as_dense}


def measure(num_values: int, num_updates: int, repeats: int) -> dict[str, Any]:
    """Return seconds and peak memory of both ways for each pipeline.

    Raises:
        RuntimeError: the two ways give different means.
    """
    load = machine.load()
    encoded = {name: encode_all(name, num_values, num_updates) for name in NAMES}
    fold = WeightedMean().open(num_values, Capacity(num_updates, num_updates, MAX_ABS))
    rows: dict[str, dict[str, Any]] = {}
    for name, updates in encoded.items():
        peaks = {way: peak_bytes(fold, updates, way) for way in WAYS}
        rows[name] = {"name": name, "frame_bytes": round(sum(map(len, updates.frames)) / num_updates)}
        rows[name] |= {f"{way}_mib": round(peak / MIB, 2) for way, peak in peaks.items()}
        if len({mean_of(fold, updates, way).tobytes() for way in WAYS}) > 1:
            raise RuntimeError(f"{name}: parts and dense vectors give different means")
    seconds: dict[tuple[str, str], list[float]] = {(name, way): [] for name in NAMES for way in WAYS}
    for _ in range(repeats):
        for (name, way), found in seconds.items():
            began_s = time.process_time()
            add_all(fold, encoded[name], way)
            found.append(time.process_time() - began_s)
    for (name, way), found in seconds.items():
        rows[name][f"{way}_s"] = spread(found, 4)
    return {
        "values": num_values,
        "updates": num_updates,
        "repeats": repeats,
        "rows": list(rows.values()),
        "load_before": load,
    }


def encode_all(name: str, num_values: int, num_updates: int) -> Updates:
    """Return so many different updates of normal values."""
    pipeline, sizes = build_pipeline(CHAINS[name]), tensor_sizes(num_values)
    rngs = [np.random.default_rng((SEED, number)) for number in range(num_updates)]
    return Updates(pipeline, sizes, [pipeline.encode(DRAWS["gaussian"](rng, num_values), rng, sizes) for rng in rngs])


def add_all(fold: Fold, updates: Updates, way: str) -> None:
    """Empty the fold and add the updates, of weights 1, 2, 3 and so on."""
    fold.clear()
    for weight, frame in enumerate(updates.frames, start=1):
        fold.add(WAYS[way](updates, frame), weight)


def mean_of(fold: Fold, updates: Updates, way: str) -> Vector:
    """Return the mean of the updates."""
    add_all(fold, updates, way)
    return np.concatenate(list(fold.mean_blocks()))


def peak_bytes(fold: Fold, updates: Updates, way: str) -> int:
    """Return how much memory adding the updates takes at its peak, in a pass of its own: tracing takes time."""
    tracemalloc.start()
    try:
        add_all(fold, updates, way)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    machine.use_one_core()
    keep_memory()  # as the daemons do
    sys.stdout.write(json.dumps(measure(options.values, options.updates, options.repeats)) + "\n")


if __name__ == "__main__":
    main()
