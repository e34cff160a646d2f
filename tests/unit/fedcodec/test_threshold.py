"""threshold against comparing the magnitudes as exact numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcodec.selectors.threshold import Threshold
from fedcodec.selectors.top_k import CHUNK_VALUES
from fedcore.errors import InvalidInput

LARGEST = float(np.finfo(np.float32).max)


def is_kept(number: float, value: float) -> bool:
    return not math.isfinite(number) or abs(Fraction(number)) >= Fraction(value)


near = st.integers(0, 2).map(lambda step: float((np.array([0x3DCC_CCCC + step], np.uint32)).view(np.float32)[0]))


@given(
    numbers=st.lists(st.floats(width=32) | near | near.map(lambda number: -number), min_size=1),
    value=st.floats(0, LARGEST, exclude_min=True) | near | st.just(0.1),
)
@example(numbers=[0.0, -0.0, 1e-45, -1e-45], value=5e-324)
@example(numbers=[LARGEST, -LARGEST, math.inf, 1.0], value=LARGEST)
@example(numbers=[0.0], value=1.0)
def test_keeps_what_is_as_large(numbers: list[float], value: float) -> None:
    values = np.array(numbers, dtype=np.float32)
    found = Threshold(value=value).select(values, np.random.default_rng(0))
    assert found.positions_n.tolist() == [at for at, number in enumerate(numbers) if is_kept(number, value)]
    assert found.values_n.tobytes() == values[found.positions_n].tobytes()
    pipeline = build_pipeline([{"codec": "threshold", "value": value}, {"codec": "rice"}])
    expected = np.zeros_like(values)
    expected[found.positions_n] = found.values_n
    frame = pipeline.encode(values, np.random.default_rng(0))
    assert pipeline.decode(frame, values.size).tobytes() == expected.tobytes()
    assert len(frame) <= pipeline.max_frame_bytes(values.size)


def test_long_vectors_too() -> None:
    values = np.random.default_rng(0).standard_normal(2 * CHUNK_VALUES + 3).astype(np.float32)
    found = Threshold(value=1.0).select(values, np.random.default_rng(0))
    np.testing.assert_array_equal(found.positions_n, np.flatnonzero(np.abs(values) >= 1))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e39, math.inf, math.nan])
def test_a_value_out_of_bounds_is_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match="value"):
        Threshold.configure({"value": value})
