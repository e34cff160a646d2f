"""Speed, size and error of codecs, on one core: `python -m benchmarks.codecs`.

A vector of random values goes through every pipeline of `CHAINS`, and through zstd alone, one after the other and round
again, so that a busy moment of the machine hits all of them. Prints one JSON object, or with `--catalogue` the table of
compression/fedcodec/README.md.

Rates are megabytes of float32 values, so of what is encoded or decoded to, for a second of processor time: everything
here is one thread that waits for nothing, and what others do on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard
from pydantic import JsonValue

from benchmarks import machine
from fedcodec.build import build_pipeline
from fedcodec.pipeline import Pipeline
from fedcore.allocator import keep_memory
from fedcore.draws import KEY_BYTES, Draws, PrivateDraws
from fedcore.layout import Vector

SEED: Final = 0
CATALOGUE_VALUES: Final = 1_000_000
SMALL: Final = (10, 1000)
"""Sizes of single tensors whose frames are weighed too."""

Stages = Sequence[Mapping[str, JsonValue]]

RICE: Final[Mapping[str, JsonValue]] = {"codec": "rice"}
HUFFMAN: Final[Mapping[str, JsonValue]] = {"codec": "huffman"}
# Of normal values of variance 1 all but one in 16,000 lie within the clip, and one in 100 beyond the threshold.
RQM: Final[Mapping[str, JsonValue]] = {"codec": "rqm", "clip": 4.0, "extension": 4.0}
THRESHOLD: Final[Mapping[str, JsonValue]] = {"codec": "threshold", "value": 2.5758}


def _top_k(fraction: float) -> dict[str, JsonValue]:
    return {"codec": "top-k", "fraction": fraction}


def _kmeans(clusters: int) -> dict[str, JsonValue]:
    return {"codec": "kmeans", "clusters": clusters}


CHAINS: Final[Mapping[str, Stages]] = {
    "raw": [{"codec": "raw"}],
    "bf16": [{"codec": "bf16"}],
    "zstd": [{"codec": "zstd"}],
    "top-k 1 %": [_top_k(0.01), RICE],
    "threshold": [THRESHOLD, RICE],
    "rand-k 10 %": [{"codec": "rand-k", "fraction": 0.1}],
    "FedZip": [{"codec": "per-tensor"}, _top_k(0.2), _kmeans(3), RICE],
    "FedZip, 16 clusters": [{"codec": "per-tensor"}, _top_k(0.2), _kmeans(16), RICE, HUFFMAN],
    "FedZip, clusters that pay": [{"codec": "per-tensor"}, _top_k(0.2), {"codec": "kmeans-auto"}, RICE, HUFFMAN],
    "FedZip at 1 %": [_top_k(0.01), _kmeans(3), RICE],
    "ComPEFT": [_top_k(0.1), {"codec": "ternary"}, RICE],
    "FLASC": [_top_k(0.1), {"codec": "bf16"}, RICE],
    "int8": [{"codec": "int8"}],
    "int4": [{"codec": "int4"}],
    "int2": [{"codec": "int2"}],
    "int8, Huffman": [{"codec": "int8"}, HUFFMAN],
    "int4, Huffman": [{"codec": "int4"}, HUFFMAN],
    "int2, Huffman": [{"codec": "int2"}, HUFFMAN],
    "sign": [{"codec": "sign"}],
    "sign, mean": [{"codec": "sign", "scale": "mean"}],
    "RQM": [RQM],
    "RQM, Huffman": [RQM, HUFFMAN],
}

DRAWS: Final[Mapping[str, Callable[[np.random.Generator, int], Vector]]] = {
    "gaussian": lambda rng, num_values: rng.standard_normal(num_values, dtype=np.float32),
    "student-t": lambda rng, num_values: rng.standard_t(3, num_values).astype(np.float32),
}


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        name: of the pipeline, or of what it is compared with.
        stages: of a pipeline, in words.
        encode: values, and the sizes of their tensors, to a frame.
        open: read a frame as the server does: each part once, none kept.
        decode: a frame to all values at once.
    """

    name: str
    stages: str
    encode: Callable[[Vector, Sequence[int]], bytes]
    open: Callable[[bytes, Sequence[int]], None]
    decode: Callable[[bytes, Sequence[int]], Vector]


def subjects() -> list[Subject]:
    """Return the pipelines, and zstd alone."""
    chains = [_of_pipeline(name, build_pipeline(stages)) for name, stages in CHAINS.items()]
    return [*chains, _zstd("zstd-1 alone", is_shuffled=False), _zstd("zstd-1 alone, bytes shuffled", is_shuffled=True)]


def tensor_sizes(num_values: int) -> list[int]:
    """Return the layout: ten tensors as equal as can be."""
    return [num_values * (i + 1) // 10 - num_values * i // 10 for i in range(10)]


def measure(draw: str, num_values: int, repeats: int) -> dict[str, Any]:
    """Return each subject's rates in `repeats` rounds, its sizes and its error."""
    load = machine.load()
    values_D = DRAWS[draw](np.random.default_rng(SEED), num_values)
    sizes = tensor_sizes(num_values)
    chosen = subjects()
    rows = [_weighed(subject, values_D, sizes) for subject in chosen]
    seconds: list[list[tuple[float, float, float]]] = [[] for _ in rows]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        for subject, found in zip(chosen, seconds, strict=True):
            found.append(_timed(subject, values_D, sizes))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    for row, found in zip(rows, seconds, strict=True):
        for name, column in zip(("encode", "open", "decode"), zip(*found, strict=True), strict=True):
            row[f"{name}_mb_s"] = spread([values_D.nbytes / 1e6 / each for each in column], 0)
    return {
        "draw": draw,
        "values": num_values,
        "tensors": len(sizes),
        "repeats": repeats,
        "core_share": round(cpu_s / wall_s, 2),
        "rows": rows,
        "load_before": load,
    }


def spread(found: Sequence[float], digits: int) -> dict[str, float]:
    """Return the median, the smallest and the largest."""
    return {"median": round(median(found), digits), "min": round(min(found), digits), "max": round(max(found), digits)}


def catalogue(num_values: int) -> str:
    """Return the Markdown table of sizes and errors."""
    values_D = DRAWS["gaussian"](np.random.default_rng(SEED), num_values)
    lines = ["| pipeline | stages | bytes | ratio | relative L2 error |", "|---|---|---:|---:|---:|"]
    for subject in subjects():
        row = _weighed(subject, values_D, tensor_sizes(num_values))
        cells = (row["name"], row["stages"], f"{row['bytes']:,}", f"{row['ratio']:.4g}", f"{row['error']:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_words(stages: Stages) -> str:
    """Return stages with their parameters as a job names them."""
    return ", ".join(
        " ".join((f"`{stage['codec']}`", *(f"{key} {value}" for key, value in stage.items() if key != "codec")))
        for stage in stages
    )


def draws_for(pipeline: Pipeline) -> Draws:
    """Return what such a pipeline has to draw from; what is private is slower. The same each time."""
    return PrivateDraws(bytes(KEY_BYTES)) if pipeline.traits.private_draws else np.random.default_rng(SEED)


def _of_pipeline(name: str, pipeline: Pipeline) -> Subject:
    def read(frame: bytes, sizes: Sequence[int]) -> None:
        for _ in pipeline.open(frame, sizes):
            pass

    return Subject(
        name,
        in_words(CHAINS[name]),
        lambda values_D, sizes: pipeline.encode(values_D, draws_for(pipeline), sizes),
        read,
        pipeline.decode,
    )


def _zstd(name: str, *, is_shuffled: bool) -> Subject:
    """Return what is compared with: the library at level 1, over float32 as it is or byte lane by byte lane."""

    def encode(values_D: Vector, sizes: Sequence[int]) -> bytes:
        lanes: npt.NDArray[np.uint8] = values_D.view(np.uint8).reshape(-1, 4)
        data = np.ascontiguousarray(lanes.T) if is_shuffled else lanes
        return zstandard.ZstdCompressor(level=1).compress(data.data.cast("B"))

    def decode(frame: bytes, sizes: Sequence[int]) -> Vector:
        data = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), dtype=np.uint8)
        lanes = np.ascontiguousarray(data.reshape(4, -1).T) if is_shuffled else data
        return lanes.reshape(-1).view(np.float32)

    def read(frame: bytes, sizes: Sequence[int]) -> None:
        decode(frame, sizes)

    return Subject(name, "", encode, read, decode)


def _weighed(subject: Subject, values_D: Vector, sizes: Sequence[int]) -> dict[str, Any]:
    """Return what does not depend on the machine."""
    frame = subject.encode(values_D, sizes)
    lost_D = subject.decode(frame, sizes) - values_D
    return {
        "name": subject.name,
        "stages": subject.stages,
        "bytes": len(frame),
        "ratio": round(values_D.nbytes / len(frame), 3),
        "error": round(_norm(lost_D) / _norm(values_D), 6),
        "small_bytes": {str(size): len(subject.encode(values_D[:size], [size])) for size in SMALL},
    }


def _norm(values_D: Vector) -> float:
    return float(np.sqrt(np.sum(np.square(values_D, dtype=np.float64))))


def _timed(subject: Subject, values_D: Vector, sizes: Sequence[int]) -> tuple[float, float, float]:
    """Return the processor seconds of encoding, opening and decoding."""
    frame = subject.encode(values_D, sizes)
    return (
        _seconds(lambda: subject.encode(values_D, sizes)),
        _seconds(lambda: subject.open(frame, sizes)),
        _seconds(lambda: subject.decode(frame, sizes)),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return what it takes the second time.

    The first one touches memory that the machine may have to get from its host. That takes longer than most decoders,
    and would be counted for whoever comes first.
    """
    work()
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--draw", choices=sorted(DRAWS), default="gaussian")
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--catalogue", action="store_true", help="print the table of the codecs' README instead")
    options = parser.parse_args()
    machine.use_one_core()
    keep_memory()  # as the daemons do
    if options.catalogue:
        sys.stdout.write(catalogue(CATALOGUE_VALUES))
    else:
        figures = measure(options.draw, options.values, options.repeats)
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
