"""Changes of frozen matrices as bytes, and the revision that stands for a chain of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.changes import begin_again, change_bytes, changed_modules, max_change_bytes, next_revision, read_change
from fedcore.errors import FrameError, LayoutError
from fedcore.layout import Layout

SIDES = {"one": (3, 5), "two": (4, 2)}
RANK = 2


def layout_of(**more: tuple[int, ...]) -> Layout:
    rows = [
        ("adapter", f"{name}.lora_{factor}.weight", shape, "float32")
        for name, (m, n) in SIDES.items()
        for factor, shape in (("A", (RANK, n)), ("B", (m, RANK)))
    ]
    return Layout.of([*rows, *(("model", name, shape, "float32") for name, shape in more.items())])


LAYOUT = layout_of()
GOLDEN = "01000000" + np.arange(8, dtype="<f4").tobytes().hex() + "00000000"
"""Rank 1 for the first module, B = 0, 1, 2 and A = 3 … 7; nothing for the second."""


def written(ranks: tuple[int, int], seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    pieces = b""
    for (m, n), rank in zip(SIDES.values(), ranks, strict=True):
        b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, rank), (rank, n)))
        pieces += b"".join(change_bytes(b, a))
    return pieces


def test_bytes_are_those_of_the_document() -> None:
    values = np.arange(8, dtype=np.float32)
    first = b"".join(change_bytes(values[:3].reshape(3, 1), values[3:].reshape(1, 5)))
    none = b"".join(change_bytes(np.empty((4, 0), np.float32), np.empty((0, 2), np.float32)))
    assert (first + none).hex() == GOLDEN
    one, two = read_change(memoryview(first + none), LAYOUT)
    assert one.a_rn is not None
    assert (one.module, one.b_mr.tolist(), one.a_rn.tolist()) == ("one", [[0], [1], [2]], [[3, 4, 5, 6, 7]])
    assert two.a_rn is not None
    assert (two.module, two.b_mr.shape, two.a_rn.shape) == ("two", (4, 0), (0, 2))
    summed = b"".join(change_bytes(np.arange(8, dtype=np.float32).reshape(4, 2), None))
    assert summed.hex() == "ffffffff" + np.arange(8, dtype="<f4").tobytes().hex()


@given(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(0, 99))
def test_what_is_written_is_read_and_within_the_bound(ranks: tuple[int, int], seed: int) -> None:
    data = written(ranks, seed)
    assert len(data) <= max_change_bytes(LAYOUT)
    read = list(read_change(memoryview(data), LAYOUT))
    for change, (m, n), rank in zip(read, SIDES.values(), ranks, strict=True):
        assert (change.a_rn is None) == (rank * (m + n) >= m * n), "the shorter form"
        assert change.dense() == pytest.approx(product_of(change.module, ranks, seed), abs=1e-5)
    assert b"".join(piece for change in read for piece in change_bytes(change.b_mr, change.a_rn)) == data


def product_of(module: str, ranks: tuple[int, int], seed: int) -> Any:
    rng = np.random.default_rng(seed)
    for (name, (m, n)), rank in zip(SIDES.items(), ranks, strict=True):
        b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, rank), (rank, n)))
        if name == module:
            return b.astype(np.float64) @ a
    raise AssertionError(module)


def test_the_bound_is_reached_by_sums() -> None:
    assert len(written((3, 2))) == max_change_bytes(LAYOUT)


@given(st.binary(max_size=200))
def test_hostile_bytes_are_refused_or_read_whole(data: bytes) -> None:
    try:
        read = list(read_change(memoryview(data), LAYOUT))
    except FrameError:
        return
    sizes = [change.b_mr.nbytes + (0 if change.a_rn is None else change.a_rn.nbytes) for change in read]
    assert sum(4 + size for size in sizes) == len(data)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-1], "ends within two"),
        (lambda data: data[:2], "ends before the rank of one"),
        (lambda data: data + b"\0", "goes on after"),
        (lambda data: b"\2\0\0\0" + data[4:], "rank 2, below 1.875"),
        (lambda data: b"\xfe\xff\xff\xff" + data[4:], "rank 4294967294, below 1.875"),
        (lambda data: b"\xff\xff\xff\xff" + data[4:], "ends before the rank of two"),
        (lambda data: b"\xff\xff\xff\xff" + data[4:60], "ends within one, of 15 values"),
        (lambda data: data[:4] + np.float32(np.nan).tobytes() + data[8:], "change of one: a value is not finite"),
    ],
)
def test_a_change_that_is_not_one_says_what_is_wrong(spoil: object, reason: str) -> None:
    assert callable(spoil)
    with pytest.raises(FrameError, match=reason):
        list(read_change(memoryview(spoil(written((1, 1)))), LAYOUT))


def test_modules_need_both_factors_of_one_rank() -> None:
    assert changed_modules(layout_of(head=(3,))) == SIDES
    for name, shape in (("three.lora_A.weight", (2, 4)), ("adapter.scale", (4,))):
        rows = [(t.group, t.name, t.shape, t.dtype) for t in LAYOUT.tensors]
        with pytest.raises(LayoutError, match=name):
            changed_modules(Layout.of([*rows, ("adapter", name, shape, "float32")]))
    with pytest.raises(LayoutError, match="no tensor is a LoRA factor"):
        changed_modules(Layout.of([("model", "weight", (2, 2), "float32")]))


def test_a_revision_is_the_hash_of_the_one_before_and_the_change() -> None:
    digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]
    revision = ""
    for digest in digests:
        before, revision = revision, next_revision(revision, digest)
        assert revision == hashlib.sha256((before + digest).encode()).hexdigest()
    other = next_revision(next_revision(next_revision("", digests[1]), digests[0]), digests[2])
    assert other != revision, "the order counts"


def test_what_begins_anew_is_the_same_for_all_and_another_with_each_version() -> None:
    one, again, next_one, other = (begin_again(LAYOUT, *key) for key in ((7, 0), (7, 0), (7, 1), (8, 0)))
    assert one is not None
    assert again is not None
    np.testing.assert_array_equal(one, again)
    for different in (next_one, other):
        assert different is not None
        assert not np.array_equal(one, different)
    for (_, name), value in LAYOUT.unflatten(one).items():
        if name.endswith("B.weight"):
            assert not value.any()
        else:
            assert 0 < np.abs(value).max() <= 1 / np.sqrt(value.shape[1])
    assert begin_again(layout_of(head=(3,)), 7, 0) is None
