"""Frames are a promise to clients in other languages: these bytes decode, and are written, for ever.

The file was written from the format in docs/wire-format.md. Nothing generates it, and entries are never
changed or removed. Values are the bits of a float32 in hexadecimal, most significant digit first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcodec import CODECS, build_pipeline
from fedcore.layout import Vector

FRAMES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "frames.json").read_text("utf-8"))


def from_hex(bits: list[str]) -> Vector:
    return np.array([int(word, 16) for word in bits], dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize("golden", FRAMES, ids=lambda golden: golden["about"].partition(":")[0])
def test_encoding_writes_the_committed_bytes(golden: dict[str, Any]) -> None:
    values = from_hex(golden["values"])
    frame = build_pipeline(golden["stages"]).encode(values, np.random.default_rng(0), golden.get("sizes"))
    assert frame.hex() == golden["frame"]


@pytest.mark.parametrize("golden", FRAMES, ids=lambda golden: golden["about"].partition(":")[0])
def test_committed_bytes_decode_to_the_committed_bits(golden: dict[str, Any]) -> None:
    sizes = golden.get("sizes", len(golden["decoded"]))
    decoded = build_pipeline(golden["stages"]).decode(bytes.fromhex(golden["frame"]), sizes)
    assert [f"{bits:08x}" for bits in decoded.view(np.uint32)] == golden["decoded"]


def test_every_codec_of_ours_has_a_golden_frame() -> None:
    ours = {name for name in CODECS.names() if CODECS.get(name).__module__.startswith("fedcodec.")}
    assert ours <= {stage["codec"] for golden in FRAMES for stage in golden["stages"]}
