"""A layout's canonical bytes and digest stand in every message and journal: they must never change."""

from __future__ import annotations

from fedcore.layout import Layout

ROWS: list[tuple[str, str, tuple[int, ...], str]] = [
    ("adapter", "encoder.0.lora_A.weight", (16, 64), "float32"),
    ("adapter", "encoder.0.lora_B.weight", (64, 16), "bfloat16"),
    ("head", "bias-ü", (10,), "float16"),
    ("head", "scale", (), "float32"),
]
CANONICAL = (
    b'[["adapter","encoder.0.lora_A.weight",[16,64],"float32"],'
    b'["adapter","encoder.0.lora_B.weight",[64,16],"bfloat16"],'
    b'["head","bias-\\u00fc",[10],"float16"],'
    b'["head","scale",[],"float32"]]'
)
DIGEST = "c2b6b36c1507b23b267cf74475a2bd572a3c1af4cc09eb1e6adc3778c96b1cc7"


def test_canonical_bytes_are_what_they_always_were() -> None:
    assert Layout.of(ROWS).to_json() == CANONICAL


def test_digest_is_what_it_always_was() -> None:
    assert Layout.of(ROWS).digest == DIGEST


def test_canonical_bytes_are_read_back() -> None:
    layout = Layout.from_json(CANONICAL)
    assert [(t.group, t.name, t.shape, t.dtype) for t in layout.tensors] == ROWS
    assert [t.offset for t in layout.tensors] == [0, 1024, 2048, 2058]
    assert layout.num_values == 2059
