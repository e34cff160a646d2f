"""The layout's bounds, with the values that a hostile peer would try."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedcore.errors import LayoutError
from fedcore.layout import MAX_DIMENSIONS, MAX_TENSORS, MAX_VALUES, Layout, TensorSpec


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout.of(("adapter", f"t{number}", shape, "float32") for number, shape in enumerate(shapes))


def test_offsets_follow_the_order_of_the_table() -> None:
    layout = layout_of((2, 3), (), (4,))
    assert [tensor.offset for tensor in layout.tensors] == [0, 6, 7]
    assert layout.num_values == 11


def test_bf16_tensors_lie_in_the_flat_vector_as_float32() -> None:
    layout = Layout.of([("adapter", "a", (2,), "bfloat16")])
    flat = layout.flatten({("adapter", "a"): np.ones(2, dtype=np.float16)})
    assert flat.dtype == np.float32


def test_unflatten_gives_views_and_not_copies() -> None:
    layout = layout_of((2, 3))
    flat = np.zeros(6, dtype=np.float32)
    layout.unflatten(flat)["adapter", "t0"][1, 2] = 5
    assert flat[5] == 5


def test_transposed_tensor_is_flattened_in_its_own_order() -> None:
    layout = layout_of((3, 2))
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert layout.flatten({("adapter", "t0"): value}).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", "a", (1,), "float32"), "tensor group ''"),
        (("g", "", (1,), "float32"), "tensor name ''"),
        (("g", "x" * 257, (1,), "float32"), "1 to 256 printable"),
        (("g", "a\n", (1,), "float32"), "printable"),
        (("g", "a\ud800", (1,), "float32"), "printable"),
        (("g", "a", (1,), "float64"), "dtype 'float64', known: float32, float16, bfloat16"),
        (("g", "a", (0,), "float32"), r"shape \(0,\), each size from 1 to"),
        (("g", "a", (-1, -1), "float32"), "each size from 1 to"),
        (("g", "a", (2**40, 2**40), "float32"), "each size from 1 to"),
        (("g", "a", (1,) * (MAX_DIMENSIONS + 1), "float32"), "9 dimensions, at most 8"),
        (("g", "a", (2**20, 2**20), "float32"), f"more than {MAX_VALUES} values"),
    ],
)
def test_a_row_out_of_bounds_is_refused_with_value_and_bound(
    row: tuple[str, str, tuple[int, ...], str], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.of([row])


def test_two_tensors_of_one_name_are_refused_but_groups_are_apart() -> None:
    Layout.of([("a", "x", (1,), "float32"), ("b", "x", (1,), "float32")])
    with pytest.raises(LayoutError, match="tensor a/x occurs twice"):
        Layout.of([("a", "x", (1,), "float32"), ("a", "x", (2,), "float32")])


def test_a_layout_without_tensors_is_refused() -> None:
    with pytest.raises(LayoutError, match="0 tensors: a layout holds 1 to"):
        Layout.of([])


@pytest.mark.parametrize("offset", [-1, 1, 7])
def test_offsets_with_gaps_or_overlaps_are_refused(offset: int) -> None:
    with pytest.raises(LayoutError, match=f"offset {offset}, expected 0"):
        Layout((TensorSpec("g", "a", (1,), "float32", offset),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "3",
        '"x"',
        "[1]",
        "[[]]",
        '[["g","a",[1]]]',
        '[["g","a",[1],"float32",0]]',
        '[["g","a",[1.0],"float32"]]',
        '[["g","a",[true],"float32"]]',
        '[["g","a","1","float32"]]',
        '[["g",1,[1],"float32"]]',
        '[["g","a",[NaN],"float32"]]',
        "[" * 100_000,
        "[" * 400 + "]" * 400,
        f'[["g","a",[{"9" * 5000}],"float32"]]',
    ],
)
def test_what_is_not_a_table_is_refused(text: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.from_json(text.encode())
    assert len(str(caught.value)) < 300


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(LayoutError, match="not JSON"):
        Layout.from_json(b"[\xff\xfe]")


def test_too_many_tensors_are_refused() -> None:
    with pytest.raises(LayoutError, match=f"at most {MAX_TENSORS}"):
        Layout.from_json(b"[" + b"0," * MAX_TENSORS + b"0]")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**36] * 8, [9] * 400_000, [10**4000] * 8])
def test_huge_shapes_are_refused_without_computing_or_allocating_their_size(shape: list[int]) -> None:
    data = f'[["g","a",{shape},"float32"]]'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError) as caught:
            Layout.from_json(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20 * len(data) + 100_000
    assert len(str(caught.value)) < 300


def test_flatten_names_the_missing_the_superfluous_and_the_misshapen_tensor() -> None:
    layout = layout_of((2,))
    good = np.zeros(2, dtype=np.float32)
    with pytest.raises(LayoutError, match="tensor adapter/t0 is missing"):
        layout.flatten({})
    with pytest.raises(LayoutError, match="tensor adapter/t9 is not in the layout"):
        layout.flatten({("adapter", "t0"): good, ("adapter", "t9"): good})
    with pytest.raises(LayoutError, match=r"t0 has shape \(1, 2\), the layout says \(2,\)"):
        layout.flatten({("adapter", "t0"): good.reshape(1, 2)})


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_unflatten_refuses_a_vector_of_another_length(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"the layout says \(2,\)"):
        layout_of((2,)).unflatten(np.zeros(shape, dtype=np.float32))


def test_what_moves_ends_where_the_basis_begins() -> None:
    rows = [("adapter", "R", (2, 2)), ("head", "w", (3,)), ("basis", "A", (2, 5)), ("basis", "B", (4, 2))]
    layout = Layout.of((*row, "float32") for row in rows)
    assert [tensor.name for tensor in layout.moving.tensors] == ["R", "w"]
    assert (layout.moving.num_values, layout.num_basis_values, layout.num_values) == (7, 18, 25)
    assert layout.moving.digest != layout.digest
    assert layout.moving.moving is layout.moving
    without = layout_of((2, 3))
    assert (without.moving, without.num_basis_values) == (without, 0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["basis", "adapter"], "tensor adapter/1 comes after the basis"),
        (["adapter", "basis", "adapter"], "tensor adapter/2 comes after the basis"),
        (["basis", "basis"], "all tensors are of the basis: nothing is trained"),
    ],
)
def test_a_basis_that_is_not_the_end_of_the_layout_is_refused(groups: list[str], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.of((group, str(number), (1,), "float32") for number, group in enumerate(groups))
