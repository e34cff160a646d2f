"""The look at every value, against a look at the values one by one; and how often a bound is computed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import UpdateRejected
from fedcore.layout import Layout
from fedcore.messages import WorkKind
from fedcore.part import Part
from fedserver.rounds.admission import CHUNK_VALUES, check_values
from fedserver.rounds.plan import make_plan
from tests.support.server import small_job

ODD = [3.0, -3.0, 3e38, float("inf"), -float("inf"), float("nan")]
value = st.sampled_from([0.0, -0.0, 2.0, -2.0, 1e-45, *ODD])


@st.composite
def a_part(draw: st.DrawFn, start: int) -> Part:
    given = np.array(draw(st.lists(value, max_size=6)), dtype=np.float32)
    positions, size, rest = None, given.size, 0.0
    if draw(st.booleans()) or not size:
        size = draw(st.integers(max(1, size), size + 3))
        positions = np.array(sorted(draw(st.permutations(range(size)))[: given.size]), dtype=np.int32)
        rest = draw(value)
    if draw(st.booleans()):
        return Part(start, size, positions, given, rest=rest)
    book = np.concatenate([given, np.array(draw(st.lists(value, max_size=4)), dtype=np.float32)])
    return Part(start, size, positions, np.arange(given.size, dtype=np.uint8), book, rest)


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    found: list[Part] = []
    for _ in range(draw(st.integers(1, 3))):
        found.append(draw(a_part(sum(part.size for part in found))))
    return found


def first_refused(part: Part) -> str | None:
    """Return what is said of a part: of the values given first, in order, then of the others."""
    values = part.dense().tolist()
    given = range(part.size) if part.positions_n is None else part.positions_n.tolist()
    for place in given:
        if not abs(values[place]) <= 2:
            return f"value {part.start + place}"
    if any(not abs(values[place]) <= 2 for place in set(range(part.size)) - set(given)):
        return f"what is not sent of the values from {part.start} on"
    return None


@given(parts())
def test_the_first_value_that_is_not_fine_is_named(parts: list[Part]) -> None:
    expected = next((said for part in parts if (said := first_refused(part)) is not None), None)
    found = None
    try:
        check_values(parts, 2.0)
    except UpdateRejected as error:
        found = str(error).removesuffix(", at most 2 is allowed").rpartition(" is ")[0]
    assert found == expected


@pytest.mark.parametrize("rest", ODD)
def test_a_rest_is_looked_at_only_where_a_value_is_left_to_it(rest: float) -> None:
    part = Part(4, 2, np.arange(2, dtype=np.int32), np.ones(2, dtype=np.float32), rest=rest)
    check_values([part], 2.0)
    with pytest.raises(UpdateRejected, match="what is not sent of the values from 4 on is"):
        check_values([part._replace(size=3)], 2.0)


@pytest.mark.parametrize("at", [0, CHUNK_VALUES - 1, CHUNK_VALUES, 2 * CHUNK_VALUES + 6])
@pytest.mark.parametrize("is_coded", [False, True])
def test_no_chunk_is_left_out(at: int, is_coded: bool) -> None:
    values = np.ones(2 * CHUNK_VALUES + 7, dtype=np.float32)
    values[at] = 3.0
    positions = np.arange(values.size, dtype=np.int32) + 5
    codes, book = (values > 1).astype(np.uint8), np.array([1, 3], dtype=np.float32)
    part = Part(10, values.size + 5, positions, *((codes, book) if is_coded else (values, None)))
    with pytest.raises(UpdateRejected, match=f"value {at + 15} is 3, at most 2 is allowed"):
        check_values([part], 2.0)


@pytest.mark.parametrize("last", [1.0, 3.0])
@pytest.mark.parametrize("is_coded", [False, True])
def test_a_look_takes_memory_for_a_chunk(last: float, is_coded: bool) -> None:
    codes = np.zeros(1 << 22, dtype=np.uint8)
    codes[-1] = 1
    book = np.array([0, last], dtype=np.float32)
    part = Part(0, codes.size, None, *((codes, book) if is_coded else (book[codes], None)))
    tracemalloc.start()
    try:
        check_values([part], 2.0)
    except UpdateRejected:
        assert last > 2
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 20 * CHUNK_VALUES < codes.size


class CountedSizes(tuple[int, ...]):
    """Sizes of tensors that know how often they were gone through."""

    __slots__ = ()
    passes = 0

    def __iter__(self) -> Iterator[int]:
        CountedSizes.passes += 1
        return super().__iter__()


def test_a_bound_is_computed_once_for_each_layout_and_is_that_of_the_pipeline() -> None:
    plan = make_plan(small_job(), "job")
    layouts = [Layout.of([("g", f"t{place}", (size,), "float32") for place in range(size)]) for size in (1, 7)]
    for layout in layouts:
        layout.__dict__["sizes"] = CountedSizes(layout.sizes)
    for layout in (*layouts, layouts[0]):
        for kind in WorkKind:
            pipeline = plan.pipeline_of(kind)
            expected = 0 if pipeline is None else pipeline.max_frame_bytes(tuple(layout.sizes))
            assert plan.max_frame_bytes(kind, layout) == expected
            before = CountedSizes.passes
            assert plan.max_frame_bytes(kind, layout) == expected
            assert CountedSizes.passes == before
    assert CountedSizes.passes > 0
