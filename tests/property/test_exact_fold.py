"""The weighted mean's sums against exact rational arithmetic.

Shape legend: N updates, D values.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedagg import Capacity, Fold
from fedagg.weighted_mean import CHUNK_VALUES, FixedPointFold, WeightedMean, scale_bits
from fedcore.layout import Vector
from fedcore.part import dense_parts

MAX_EXACT_WEIGHT = 1 << 29
"""24 bits of value and 29 of weight are 53: up to here rint sees the exact product."""

MAX_ABS = 2.0**100
FLOAT32_TINY = float(np.finfo(np.float32).tiny)

Update = tuple[list[float], int]


@st.composite
def capacities(draw: st.DrawFn, max_weight: int = 1 << 31) -> Capacity:
    weight_bits = draw(st.integers(0, (max_weight - 1).bit_length()))
    update_bits = draw(st.integers(0, 40 - weight_bits))
    return Capacity(
        max_updates=draw(st.integers((1 << update_bits) // 2 + 1, 1 << update_bits)),
        max_weight=draw(st.integers((1 << weight_bits) // 2 + 1, 1 << weight_bits)),
        max_abs=draw(
            st.sampled_from([FLOAT32_TINY, 2.0**-60, 1.0, 64.0, 2.0**40, MAX_ABS]) | st.floats(FLOAT32_TINY, MAX_ABS)
        ),
    )


@st.composite
def cohorts(draw: st.DrawFn, max_weight: int = MAX_EXACT_WEIGHT) -> tuple[Capacity, list[Update]]:
    capacity = draw(capacities(max_weight))
    # The largest float32 that is not above the bound.
    top = np.float32(capacity.max_abs)
    bound = float(top if float(top) <= capacity.max_abs else np.nextafter(top, np.float32(0)))
    extremes = [bound, -bound, 0.0, -0.0, *(x for x in (2.0**-149, -(2.0**-130)) if abs(x) <= bound)]
    value = st.sampled_from(extremes) | st.floats(-bound, bound, width=32)
    num_values = draw(st.integers(1, 5))
    update = st.tuples(
        st.lists(value, min_size=num_values, max_size=num_values),
        st.sampled_from([1, capacity.max_weight]) | st.integers(1, capacity.max_weight),
    )
    return capacity, draw(st.lists(update, min_size=1, max_size=min(6, capacity.max_updates)))


def folded(capacity: Capacity, updates: list[Update]) -> Fold:
    fold = WeightedMean().open(len(updates[0][0]), capacity)
    for values, weight in updates:
        fold.add(dense_parts([np.array(values, dtype=np.float32)]), weight)
    return fold


def mean(fold: Fold) -> Vector:
    return np.concatenate(list(fold.mean_blocks()))


def exact_sums(capacity: Capacity, updates: list[Update]) -> list[int]:
    """Return the sums as Python integers; `round` of a Fraction goes to nearest, ties to even."""
    scale = Fraction(2) ** scale_bits(capacity)
    columns = zip(*([round(Fraction(x) * weight * scale) for x in values] for values, weight in updates), strict=True)
    return [sum(column) for column in columns]


@given(cohorts())
def test_mean_has_the_bits_of_exact_integer_sums(cohort: tuple[Capacity, list[Update]]) -> None:
    capacity, updates = cohort
    divisor = math.ldexp(sum(weight for _, weight in updates), scale_bits(capacity))
    expected = np.array([float(total) / divisor for total in exact_sums(capacity, updates)]).astype(np.float32)
    assert mean(folded(capacity, updates)).tobytes() == expected.tobytes()


@given(cohorts())
def test_mean_is_within_the_documented_error_of_the_true_mean(cohort: tuple[Capacity, list[Update]]) -> None:
    capacity, updates = cohort
    total = sum(weight for _, weight in updates)
    grid = Fraction(len(updates), 2 * total) / Fraction(2) ** scale_bits(capacity)
    for index, found in enumerate(mean(folded(capacity, updates))):
        true = sum((Fraction(values[index]) * weight for values, weight in updates), Fraction(0)) / total
        rounding = (abs(true) + grid) * Fraction(1, 2**23) + Fraction(1, 2**149)
        assert abs(Fraction(float(found)) - true) <= grid + rounding


@given(cohorts(max_weight=1 << 31), st.data())
def test_order_does_not_change_a_bit(cohort: tuple[Capacity, list[Update]], data: st.DataObject) -> None:
    capacity, updates = cohort
    shuffled = data.draw(st.permutations(updates))
    assert mean(folded(capacity, shuffled)).tobytes() == mean(folded(capacity, updates)).tobytes()


@given(cohorts(max_weight=1 << 31), st.data())
def test_folding_again_after_a_restart_does_not_change_a_bit(
    cohort: tuple[Capacity, list[Update]], data: st.DataObject
) -> None:
    capacity, updates = cohort
    expected = mean(folded(capacity, updates)).tobytes()
    crash_after = data.draw(st.integers(0, len(updates)))
    journaled = data.draw(st.permutations(updates[:crash_after]))
    assert mean(folded(capacity, [*journaled, *updates[crash_after:]])).tobytes() == expected


@given(capacities())
def test_no_capacity_can_overflow(capacity: Capacity) -> None:
    scale = Fraction(2) ** scale_bits(capacity)
    largest = math.ceil(Fraction(capacity.max_abs) * capacity.max_weight * scale)
    assert capacity.max_updates * largest <= 1 << 62


@given(capacities())
def test_capacity_wastes_at_most_three_bits(capacity: Capacity) -> None:
    full = Fraction(capacity.max_abs) * capacity.max_weight * capacity.max_updates * Fraction(2) ** scale_bits(capacity)
    assert full > 1 << 59


@given(capacities())
def test_a_value_of_weight_one_at_the_bound_keeps_22_bits(capacity: Capacity) -> None:
    assert Fraction(capacity.max_abs) * Fraction(2) ** scale_bits(capacity) > 1 << 21


@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_fold_at_every_bound_gives_the_bound(sign: int) -> None:
    for max_updates, weight_bits, abs_bits in itertools.product((1, 2, 3, 500), (0, 7, 31), (-126, 0, 100)):
        capacity = Capacity(max_updates, 1 << weight_bits, math.ldexp(1, abs_bits))
        values = [sign * capacity.max_abs]
        assert mean(folded(capacity, [(values, capacity.max_weight)] * max_updates)).tolist() == values


@given(st.integers(0, 3), st.integers(-2, 2), st.integers(1, 4))
def test_chunks_cover_every_length(chunks: int, rest: int, num_blocks: int) -> None:
    num_values = max(1, chunks * CHUNK_VALUES + rest)
    values = np.random.default_rng(num_values).uniform(-1, 1, num_values).astype(np.float32)
    fold = FixedPointFold(num_values, Capacity(2, 8, 1.0))
    fold.add(dense_parts(np.array_split(values, num_blocks)), 8)
    assert mean(fold).tobytes() == values.tobytes()


def test_equal_updates_average_to_themselves() -> None:
    values = np.random.default_rng(0).uniform(-64, 64, 1000).astype(np.float32)
    fold = WeightedMean().open(1000, Capacity(16, 1000, 64.0))
    for weight in (1, 3, 1000, 77):
        fold.add(dense_parts([values]), weight)
    np.testing.assert_allclose(mean(fold), values, rtol=2**-23, atol=2**-30)


def test_negative_zeros_average_to_zero() -> None:
    fold = folded(Capacity(2, 1, 1.0), [([-0.0], 1), ([-0.0], 1)])
    assert mean(fold).tobytes() == np.float32(0.0).tobytes()


def test_values_go_to_the_nearest_grid_point_and_ties_to_the_even_one() -> None:
    capacity = Capacity(1 << 20, 1 << 20, 1.0)
    grid = 2.0 ** -scale_bits(capacity)
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 0.51, -0.49, -0.51, 1.75]
    fold = folded(capacity, [([half * grid for half in halves], 1)])
    assert (mean(fold) / np.float32(grid)).tolist() == [0, 2, 2, 0, -2, -2, 0, 1, 0, -1, 2]
