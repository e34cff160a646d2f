"""top-k against sorting, on every kind of float and on both sides of the histogram."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec.selectors.top_k import CHUNK_VALUES, TopK, largest
from fedcore.layout import Vector

SPECIAL = [0x00000000, 0x00000001, 0x007FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]


def sorted_out(values: Vector, count: int) -> list[int]:
    """Return where the largest are, by sorting whole numbers: of equal ones the first."""
    sizes = [int(bits) & 0x7FFF_FFFF for bits in values.view(np.uint32)]
    return sorted(sorted(range(len(sizes)), key=lambda at: (-sizes[at], at))[:count])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


bits = st.sampled_from(SPECIAL) | st.integers(0, (1 << 31) - 1)
patterns = st.lists(st.tuples(bits, st.booleans()).map(lambda parts: parts[0] | parts[1] << 31), min_size=1)


@given(patterns=patterns, fraction=st.floats(0, 1, exclude_min=True))
def test_selects_what_sorting_does(patterns: list[int], fraction: float) -> None:
    values = np.array(patterns, dtype=np.uint32).view(np.float32)
    stage = TopK(fraction=fraction)
    found = stage.select(values, rng())
    count = math.ceil(fraction * values.size)
    assert stage.max_selected(values.size) == count
    assert found.positions_n.tolist() == sorted_out(values, count)
    assert found.values_n.tobytes() == values[found.positions_n].tobytes()
    assert found.note == b""


def long_vectors() -> dict[str, Vector]:
    size = 2 * CHUNK_VALUES + 77
    normal = rng().standard_normal(size).astype(np.float32)
    special = np.array(SPECIAL, dtype=np.uint32)[rng(1).integers(0, len(SPECIAL), size)]
    rare = normal.copy()
    rare[rng(2).integers(0, size, 300)] = [np.nan, -np.inf, -np.nan] * 100
    return {
        "normal": normal,
        "every kind of number": rng(3).integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32),
        "ties between few numbers": (special | rng(4).integers(0, 2, size, dtype=np.uint32) << 31).view(np.float32),
        "some that are not finite": rare,
        "ties at the edges of buckets": np.round(normal, 1),
        "one number": np.full(size, -1.5, np.float32),
        "signed zeros": np.copysign(np.zeros(size, np.float32), normal),
        "few that are not zero": np.where(normal > 3, normal, np.float32(0)),
        "one bucket": (rng(5).integers(0, 1 << 16, size, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32),
    }


@pytest.mark.parametrize("name", long_vectors())
def test_long_vectors_too(name: str) -> None:
    values = long_vectors()[name]
    order = np.argsort(0x7FFF_FFFF - (values.view(np.uint32) & 0x7FFF_FFFF).astype(np.int64), kind="stable")
    for count in (1, 2, 100, values.size // 100, values.size // 10, values.size // 3, values.size - 1, values.size):
        np.testing.assert_array_equal(largest(values, count), np.sort(order[:count]))


def test_nan_is_larger_than_infinity_and_zeros_are_equal() -> None:
    values = np.array([1, np.inf, -np.nan, -np.inf, np.nan, 0.0], dtype=np.float32)
    for count, expected in [(1, [2]), (2, [2, 4]), (3, [1, 2, 4]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4])]:
        assert largest(values, count).tolist() == expected
    assert largest(np.array([0.0, -0.0, 0.0], dtype=np.float32), 2).tolist() == [0, 1]
