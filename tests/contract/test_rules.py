"""What every rule that folds must do, ours or installed: each is tried with its defaults."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from fedagg import RULES, Capacity, Fold, FoldRule
from fedcore.errors import InvalidInput
from fedcore.layout import Vector
from fedcore.part import Part, dense_parts

CATALOGUE = Path(__file__).parents[2] / "aggregators" / "fedagg" / "README.md"
D = 1000
CAPACITY = Capacity(max_updates=40, max_weight=100, max_abs=2.0)

pytestmark = pytest.mark.parametrize("name", [name for name in RULES.names() if RULES.get(name).traits.shape == "fold"])


def refusal() -> pytest.RaisesExc[ValueError]:
    """Expect what the contract promises: a ValueError, in whatever words."""
    return pytest.raises(ValueError)  # noqa: PT011


def make(name: str) -> FoldRule:
    rule = RULES.get(name).configure({})
    assert isinstance(rule, FoldRule)
    return rule


def updates(num_updates: int, num_values: int = D) -> list[tuple[Vector, int]]:
    rng = np.random.default_rng(7)
    return [(rng.uniform(-2, 2, num_values).astype(np.float32), int(rng.integers(1, 101))) for _ in range(num_updates)]


def folded(name: str, given: list[tuple[Vector, int]]) -> Fold:
    fold = make(name).open(given[0][0].size, CAPACITY)
    for values, weight in given:
        fold.add(dense_parts([values]), weight)
    return fold


def aggregate(fold: Fold) -> Vector:
    return np.concatenate(list(fold.mean_blocks()))


def test_rule_is_registered_under_its_own_name(name: str) -> None:
    assert RULES.get(name).name == name


def test_catalogue_lists_every_rule_of_ours(name: str) -> None:
    if RULES.get(name).__module__.startswith("fedagg."):
        assert f"| `{name}` |" in CATALOGUE.read_text("utf-8")


def test_parameters_survive_json(name: str) -> None:
    rule = make(name)
    assert RULES.get(name).configure(json.loads(json.dumps(rule.params()))) == rule


def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="no-such-parameter"):
        RULES.get(name).configure({"no-such-parameter": 1})


def test_fold_streams_and_waits_for_nobody(name: str) -> None:
    traits = make(name).traits
    assert traits.shape != "fold" or (traits.streams and not traits.needs_all)


def test_a_cleared_fold_is_as_good_as_new(name: str) -> None:
    before, after = updates(5), updates(3)[::-1]
    fold = folded(name, before)
    fold.clear()
    assert (fold.num_updates, fold.total_weight) == (0, 0)
    with refusal():
        fold.mean_blocks()
    for values, weight in after:
        fold.add(dense_parts([values]), weight)
    assert np.array_equal(aggregate(fold), aggregate(folded(name, after)))
    with refusal():
        fold.add(dense_parts([after[0][0][: D // 2]]), 1)
    fold.clear()
    fold.add(dense_parts([after[0][0]]), 1)
    assert fold.num_updates == 1


def test_counts_follow_the_updates(name: str) -> None:
    given = updates(5)
    empty = make(name).open(D, CAPACITY)
    assert (empty.num_updates, empty.total_weight) == (0, 0)
    fold = folded(name, given)
    assert (fold.num_updates, fold.total_weight) == (5, sum(weight for _, weight in given))


def test_aggregate_is_finite_and_within_the_bound(name: str) -> None:
    result = aggregate(folded(name, updates(9)))
    assert result.shape == (D,)
    assert result.dtype == np.float32
    assert (np.abs(result) <= CAPACITY.max_abs).all()


def test_exact_rule_does_not_depend_on_the_order(name: str) -> None:
    if not make(name).traits.exact:
        pytest.skip("does not claim to be exact")
    given = updates(12)
    expected = aggregate(folded(name, given)).tobytes()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(given))
        assert aggregate(folded(name, [given[i] for i in order])).tobytes() == expected


@pytest.mark.parametrize("block_values", [1, 7, 999, 1000, 5000])
def test_cutting_updates_into_blocks_changes_nothing(name: str, block_values: int) -> None:
    given = updates(3)
    fold = make(name).open(D, CAPACITY)
    for values, weight in given:
        fold.add(dense_parts(values[start : start + block_values] for start in range(0, D, block_values)), weight)
    assert aggregate(fold).tobytes() == aggregate(folded(name, given)).tobytes()


@pytest.mark.parametrize("block_values", [1, 7, 999, 1000, 5000])
def test_aggregate_comes_in_blocks_of_the_asked_size(name: str, block_values: int) -> None:
    fold = folded(name, updates(3))
    blocks = list(fold.mean_blocks(block_values))
    assert [block.size for block in blocks[:-1]] == [block_values] * (len(blocks) - 1)
    assert np.concatenate(blocks).tobytes() == aggregate(fold).tobytes()


def test_updates_may_be_read_only_and_are_not_changed(name: str) -> None:
    given = updates(3)
    before = [values.tobytes() for values, _ in given]
    for values, _ in given:
        values.flags.writeable = False
    folded(name, given)
    assert [values.tobytes() for values, _ in given] == before


def test_reading_the_aggregate_changes_nothing(name: str) -> None:
    given = updates(6)
    fold = folded(name, given[:3])
    for block in fold.mean_blocks():
        block.fill(1)
    for values, weight in given[3:]:
        fold.add(dense_parts([values]), weight)
    assert aggregate(fold).tobytes() == aggregate(folded(name, given)).tobytes()


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_weight_out_of_bounds_leaves_the_fold_as_it_was(name: str, weight: int) -> None:
    given = updates(3)
    fold = folded(name, given)
    with refusal():
        fold.add(dense_parts([given[0][0]]), weight)
    assert fold.num_updates == 3
    assert aggregate(fold).tobytes() == aggregate(folded(name, given)).tobytes()


def test_update_above_capacity_leaves_the_fold_as_it_was(name: str) -> None:
    given = updates(CAPACITY.max_updates)
    fold = folded(name, given)
    with refusal():
        fold.add(dense_parts([given[0][0]]), 1)
    assert fold.num_updates == CAPACITY.max_updates
    assert aggregate(fold).tobytes() == aggregate(folded(name, given)).tobytes()


def interrupted(values: Vector) -> Iterator[Vector]:
    yield values[: D // 2]
    raise OSError("disk went away")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (lambda values: [values[:-1]], ValueError),
        (lambda values: [values, values[:1]], ValueError),
        (lambda values: [], ValueError),
        (lambda values: [values.astype(np.float64)], ValueError),
        (lambda values: [values.reshape(1, -1)], ValueError),
        (interrupted, OSError),
    ],
    ids=["short", "long", "empty", "float64", "matrix", "interrupted"],
)
def test_update_that_ends_badly_breaks_the_fold(
    name: str, blocks: Callable[[Vector], list[Vector]], expected: type[Exception]
) -> None:
    given = updates(3)
    fold = folded(name, given)
    with pytest.raises(expected):
        fold.add(dense_parts(blocks(given[0][0])), 1)
    assert (fold.num_updates, fold.total_weight) == (3, sum(weight for _, weight in given))
    with refusal():
        fold.add(dense_parts([given[0][0]]), 1)
    with refusal():
        fold.mean_blocks()


def test_nothing_has_no_aggregate(name: str) -> None:
    with refusal():
        make(name).open(D, CAPACITY).mean_blocks()


def test_fold_and_block_of_no_values_are_refused(name: str) -> None:
    with refusal():
        make(name).open(0, CAPACITY)
    with refusal():
        folded(name, updates(1)).mean_blocks(0)


def a_part(seed: int, start: int, size: int, is_sparse: bool, has_book: bool) -> Part:
    """Return values at random, given in one of the four ways."""
    rng = np.random.default_rng(seed)
    positions_n: npt.NDArray[np.signedinteger[Any]] | None = None
    if is_sparse:
        positions_n = np.flatnonzero(rng.random(size) < 0.3)
        positions_n = positions_n.astype(np.int32) if seed % 2 else positions_n
    count = size if positions_n is None else positions_n.size
    rest = float(np.float32(rng.choice([0, rng.uniform(-2, 2)]))) if is_sparse else 0.0
    if not has_book:
        return Part(start, size, positions_n, rng.uniform(-2, 2, count).astype(np.float32), rest=rest)
    book = rng.uniform(-2, 2, int(rng.integers(1, 300))).astype(np.float32)
    return Part(start, size, positions_n, rng.integers(0, book.size, count, dtype=np.uint16), book, rest)


@pytest.mark.parametrize("positions", [None, [0, 1, 2]])
@pytest.mark.parametrize("odd", [3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("num_entries", [3, 300])
def test_entries_and_a_rest_that_no_value_has_add_nothing(
    name: str, num_entries: int, odd: float, positions: list[int] | None
) -> None:
    book = np.full(num_entries, odd, dtype=np.float32)
    book[:2] = 1.5, -0.25
    positions_n = None if positions is None else np.array(positions)
    codes = np.array([1, 0, 1], dtype=np.uint16)
    fold = make(name).open(3, CAPACITY)
    fold.add([Part(0, 3, positions_n, codes, book, 0.0 if positions is None else odd)], 2)
    dense = make(name).open(3, CAPACITY)
    dense.add(dense_parts([book[codes]]), 2)
    assert aggregate(fold).tobytes() == aggregate(dense).tobytes()


@drawn(
    updates=st.lists(
        st.tuples(
            st.integers(1, 100),
            st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.booleans()), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1000),
)
def test_however_values_are_given_they_add_the_same(
    name: str, updates: list[tuple[int, list[tuple[int, bool, bool]]]], seed: int
) -> None:
    total = sum(size for size, *_ in updates[0][1])
    in_parts, dense = (make(name).open(total, CAPACITY) for _ in range(2))
    for number, (weight, shapes) in enumerate(updates):
        parts: list[Part] = []
        for size, is_sparse, has_book in [*shapes, (total, True, False)]:
            start = sum(part.size for part in parts)
            if start < total:
                part_seed = seed + 7 * number + len(parts)
                parts.append(a_part(part_seed, start, min(size, total - start), is_sparse, has_book))
        in_parts.add(parts, weight)
        dense.add(dense_parts([part.dense() for part in parts]), weight)
    assert aggregate(in_parts).tobytes() == aggregate(dense).tobytes()


def test_memory_does_not_grow_with_the_number_of_updates(name: str) -> None:
    if not make(name).traits.streams:
        pytest.skip("does not claim to stream")
    num_values = 1 << 18
    values = updates(1, num_values)[0][0]
    fold = make(name).open(num_values, CAPACITY)
    fold.add(dense_parts([values]), 1)
    tracemalloc.start()
    try:
        for _ in range(20):
            fold.add(dense_parts([values]), 1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * num_values
