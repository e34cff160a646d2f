from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from fedcore.errors import LayoutError
from fedcore.layout import DTYPES, Layout

Row = tuple[str, str, tuple[int, ...], str]

WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)
ROWS: st.SearchStrategy[Row] = st.tuples(WORDS, WORDS, SHAPES, st.sampled_from(DTYPES))
TABLES = st.lists(ROWS, min_size=1, max_size=8, unique_by=lambda row: row[:2])

JSON: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([*DTYPES, "g", "n"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=20,
)
# Rows that are nearly right get further into the reader than arbitrary JSON does.
NEAR_ROWS = st.tuples(
    st.one_of(WORDS, JSON),
    st.one_of(WORDS, JSON),
    st.one_of(st.lists(st.one_of(st.integers(-1, 2**50), JSON), max_size=9), JSON),
    st.one_of(st.sampled_from(DTYPES), JSON),
).map(list)


@given(TABLES, st.data())
def test_flatten_and_unflatten_are_inverse(table: list[Row], data: st.DataObject) -> None:
    layout = Layout.of(table)
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    tensors = {(group, name): rng.standard_normal(shape, dtype=np.float32) for group, name, shape, _ in table}
    flat = layout.flatten({key: tensors[key] for key in reversed(tensors)})  # the order of the mapping is no matter
    assert flat.dtype == np.float32
    assert flat.tobytes() == b"".join(tensors[group, name].tobytes() for group, name, _, _ in table)
    back = layout.unflatten(flat)
    assert list(back) == [row[:2] for row in table]
    assert all(back[key].shape == value.shape and np.array_equal(back[key], value) for key, value in tensors.items())


@given(TABLES)
def test_json_round_trip_keeps_table_and_digest(table: list[Row]) -> None:
    layout = Layout.of(table)
    back = Layout.from_json(layout.to_json())
    assert back == layout
    assert back.digest == layout.digest
    assert layout.num_values == sum(math.prod(shape) for _, _, shape, _ in table)


@given(TABLES, TABLES)
def test_digests_are_equal_only_for_equal_tables(a: list[Row], b: list[Row]) -> None:
    assert (Layout.of(a).digest == Layout.of(b).digest) == (a == b)


@given(TABLES, st.data())
def test_digest_changes_with_any_single_change(table: list[Row], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(table) - 1))
    group, name, shape, dtype = table[index]
    changed: Row = data.draw(
        st.sampled_from(
            [
                (group + "x", name, shape, dtype),
                (group, name + "x", shape, dtype),
                (group, name, (*shape, 1), dtype),  # as many values, another shape
                (group, name, (*shape, 2), dtype),
                (group, name, shape, DTYPES[DTYPES.index(dtype) - 1]),
            ]
        )
    )
    other = [*table[:index], changed, *table[index + 1 :]]
    assume(len({row[:2] for row in other}) == len(other))
    assert Layout.of(other).digest != Layout.of(table).digest


@given(TABLES)
def test_digest_changes_with_the_order(table: list[Row]) -> None:
    assume(len(table) > 1)
    assert Layout.of(table[::-1]).digest != Layout.of(table).digest


@given(st.one_of(JSON, st.lists(NEAR_ROWS, max_size=3)))
def test_hostile_json_is_a_layout_or_a_layout_error(tree: Any) -> None:
    try:
        layout = Layout.from_json(json.dumps(tree).encode())
    except LayoutError as error:
        text = str(error)
    else:
        text = ""
        assert [[t.group, t.name, list(t.shape), t.dtype] for t in layout.tensors] == tree
    assert len(text) < 1000


@given(st.binary(max_size=200))
def test_hostile_bytes_are_a_layout_error(data: bytes) -> None:
    try:
        Layout.from_json(data)
    except LayoutError:
        return
    assert isinstance(json.loads(data), list)
