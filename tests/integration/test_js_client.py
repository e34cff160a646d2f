"""The decoder in examples/js_client, which knows docs/wire-format.md alone, agrees with ours on every frame.

A test here fails where there is no Node.js (Debian: `make node`).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcodec import Pipeline, build_pipeline
from fedcodec.frame import pack_header
from fedcore.errors import FrameError
from fedcore.layout import Vector

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "frames.json"

PIPELINES: list[list[dict[str, Any]]] = [
    [{"codec": "zstd"}],
    [{"codec": "int8"}, {"codec": "huffman"}],
    [{"codec": "fp16"}, {"codec": "zstd", "width": 2, "level": 19}],
    [{"codec": "rand-k", "fraction": 0.2}, {"codec": "rqm"}, {"codec": "huffman"}],
    [{"codec": "threshold", "value": 1.0}, {"codec": "bf16"}, {"codec": "rice"}],
    [{"codec": "top-k", "fraction": 0.1}, {"codec": "int4", "block": 16}, {"codec": "zstd", "width": 1, "level": 9}],
    [{"codec": "per-tensor"}, {"codec": "top-k", "fraction": 0.1}, {"codec": "kmeans"}, {"codec": "rice"}],
    [{"codec": "per-tensor"}, {"codec": "kmeans-auto"}, {"codec": "huffman"}],
    [{"codec": "per-tensor"}, {"codec": "ternary", "alpha": 1.0}],
    [{"codec": "per-tensor"}, {"codec": "rqm", "levels": 5}],
    [{"codec": "per-tensor"}, {"codec": "sign", "scale": "mean"}, {"codec": "zstd", "width": 1, "level": 19}],
    [{"codec": "per-tensor"}, {"codec": "ranks"}],
]
TENSORS: list[list[int]] = [[1], [40], [3, 0, 7], [1500, 1, 1100]]


def some_values(rng: np.random.Generator, num_values: int) -> list[Vector]:
    """Normal ones with ties, subnormal ones, and any pattern, NaNs and infinities too."""
    normal = rng.standard_normal(num_values).round(1).astype(np.float32)
    patterns = rng.integers(0, 1 << 32, num_values, dtype=np.uint32).view(np.float32)
    return [normal, normal * np.float32(1e-39), patterns]


def decoded(pipeline: Pipeline, frame: bytes, sizes: list[int]) -> list[str] | None:
    """Return the patterns in hexadecimal, or None for a frame that is refused."""
    try:
        return [f"{bits:08x}" for bits in pipeline.decode(frame, sizes).view(np.uint32)]
    except FrameError:
        return None


def damaged(frame: bytes, rng: np.random.Generator) -> bytes:
    """Change one bit behind the magic."""
    changed = bytearray(frame)
    changed[rng.integers(4, len(frame))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def check(entries: list[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(entries), encoding="utf-8")
    done = run(file)
    assert (done.stdout, done.stderr) == (f"{len(entries)} frames, 0 failures\n", "")
    assert done.returncode == 0


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = ["node", str(ROOT / "examples" / "js_client" / "decode.mjs"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_golden_frames_decode_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    check(json.loads(GOLDEN.read_text("utf-8")), tmp_path / "frames.json")


@pytest.mark.parametrize("stages", PIPELINES, ids=lambda stages: "-then-".join(stage["codec"] for stage in stages))
def test_frames_of_random_values_decode_to_the_same_bits(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    pipeline = build_pipeline(stages)
    entries = []
    for sizes in TENSORS:
        for number, values in enumerate(some_values(rng, sum(sizes))):
            entry: dict[str, Any] = {"about": f"{sizes} {number}", "stages": stages, "sizes": sizes}
            with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs
                frame = pipeline.encode(values, rng, sizes)
            bits = decoded(pipeline, frame, sizes)
            assert bits is not None
            entries.append({**entry, "frame": frame.hex(), "decoded": bits})
            for hostile in (damaged(frame, rng) for _ in range(20)):
                # What libzstd takes of damaged streams is its own.
                if (bits := decoded(pipeline, hostile, sizes)) is None:
                    entries.append({**entry, "frame": hostile.hex(), "decoded": None})
    assert any(entry["decoded"] is None for entry in entries)
    check(entries, tmp_path / "frames.json")


HUGE = 1 << 20
HOSTILE: list[tuple[str, list[dict[str, Any]], int, str]] = [
    ("a content of 2^62 bytes", [{"codec": "zstd"}], 25, "28b52ffd e0 00000000 00000040"),
    ("98047 matches of 65539 bytes", [{"codec": "zstd"}], 25, "28b52ffd 20 64 550000 08 41 ffffff 54 000034 01"),
    ("one byte of 2^20 values", [{"codec": "raw"}], HUGE, "00"),
    ("2^36 - 1 positions", [{"codec": "threshold"}], HUGE, "ffffffffff01"),
    ("2^20 gaps in one byte", [{"codec": "threshold"}, {"codec": "rice"}], HUGE, "808040 00 ff"),
    (
        "2^20 words in no byte",
        [{"codec": "int2"}, {"codec": "huffman"}],
        HUGE,
        "0000803f" * 4096 + "2201" + "00" * 1792,
    ),
    ("two values of one that is kept", [{"codec": "top-k", "fraction": 0.5}], 2, "02 02 0000803f 0000803f"),
    ("remainders of 32 bits", [{"codec": "threshold"}, {"codec": "rice"}], 2, "01 20 0000000000 0000803f"),
    ("words that are no tree", [{"codec": "int2"}, {"codec": "huffman"}], 2, "0000803f 22 00 0400 08"),
    ("values of which none is finite", [{"codec": "kmeans", "clusters": 2}], 2, "01 0000c07f 0000c07f 00"),
    ("a code above its clusters", [{"codec": "kmeans-auto"}], 2, "01 01 0000803f 00000000 00 02"),
    ("one cluster", [{"codec": "kmeans-auto"}], 2, "00 00 00000000"),
    ("17 clusters", [{"codec": "kmeans-auto"}], 20, "00 10" + "00000000" * 17),
    ("signs as float32", [{"codec": "per-tensor"}, {"codec": "sign", "scale": "mean"}], 1, "01 0000803f"),
    ("levels as float32", [{"codec": "per-tensor"}, {"codec": "rqm"}], 1, "01 0000803f"),
    ("a segment longer than its value", [{"codec": "per-tensor"}, {"codec": "top-k"}], 1, "00 01 0000803f"),
    ("a rank twice", [{"codec": "ranks"}], 2, "00 00"),
    ("a rank of what is not finite", [{"codec": "ranks"}], 2, "01 01"),
]


def test_what_no_encoder_writes_is_refused(tmp_path: Path) -> None:
    entries = []
    for about, stages, num_values, payload in HOSTILE:
        pipeline = build_pipeline(stages)
        frame = pack_header(pipeline.wire_ids, num_values) + bytes.fromhex(payload)
        assert decoded(pipeline, frame, [num_values]) is None, about
        entries.append({"about": about, "stages": stages, "sizes": [num_values], "frame": frame.hex(), "decoded": None})
    check(entries, tmp_path / "frames.json")


def test_a_wrong_bit_is_told(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))[0]
    golden["decoded"][0] = "3f800001"
    (tmp_path / "frames.json").write_text(json.dumps([golden]), encoding="utf-8")
    done = run(tmp_path / "frames.json")
    assert done.returncode == 1
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{golden['about']}: decodes to 3f800000,")
    assert last == "1 frames, 1 failures"
