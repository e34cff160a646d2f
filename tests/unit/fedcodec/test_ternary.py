"""Signs and their scales against the formulas, by Python's statistics in fractions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcodec.quantisers.ternary import Sign, Ternary
from fedcodec.reader import Reader
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector

RNG = np.random.default_rng(0)
LISTS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=50)


def f32(values: Sequence[float]) -> Vector:
    return np.array(values, dtype=np.float32)


def decode(stage: Ternary | Sign, values: Vector, num_zeros: int = 0) -> Vector:
    coded = stage.encode(values, num_zeros, RNG)
    return stage.decode(coded.codes_n, stage.read_table(Reader(coded.table), values.size), 0).values_n


def signs(values: Sequence[float]) -> list[int]:
    return [-1 if value < 0 else 1 for value in values]


@given(values=LISTS, num_zeros=st.integers(0, 20))
def test_scale_is_the_mean_magnitude_whatever_was_left_out(values: list[float], num_zeros: int) -> None:
    mean = statistics.fmean(map(abs, values))
    expected = [sign * mean for sign in signs(values)]
    for stage in (Ternary(), Sign(scale="mean")):
        np.testing.assert_allclose(decode(stage, f32(values), num_zeros), expected, rtol=1e-6, atol=1e-44)


@given(values=LISTS, num_zeros=st.integers(0, 20), alpha=st.floats(0.5, 10))
def test_scale_with_alpha_is_the_deviation_with_the_zeros(values: list[float], num_zeros: int, alpha: float) -> None:
    scale = alpha * statistics.pstdev([*values, *[0.0] * num_zeros])
    expected = [sign * scale for sign in signs(values)] if np.float32(scale) else [0.0] * len(values)
    # What is lost where all values are nearly equal: rounding of their mean.
    rounding = alpha * 1e-15 * max(map(abs, values))
    np.testing.assert_allclose(
        np.abs(decode(Ternary(alpha=alpha), f32(values), num_zeros)), np.abs(expected), rtol=1e-6, atol=rounding + 1e-44
    )


@given(values=LISTS)
def test_mean_magnitude_loses_the_least_and_less_than_everything(values: list[float]) -> None:
    decoded, exact = decode(Ternary(), f32(values)).astype(float), np.array(values)
    total = np.sum(exact**2)
    lost = np.sum((decoded - exact) ** 2)
    assert lost <= total * (1 - 0.99 / len(values)) + 1e-70
    for factor in (0.9, 1.1):
        assert lost <= np.sum((decoded * factor - exact) ** 2) + 1e-6 * total


@given(values=LISTS, scale=st.floats(2.0**-10, 2.0**10, width=32))
def test_sign_of_fixed_worth_is_a_bit_a_value(values: list[float], scale: float) -> None:
    np.testing.assert_array_equal(decode(Sign(scale=scale), f32(values)), f32(signs(values)) * np.float32(scale))
    frame = build_pipeline([{"codec": "sign", "scale": scale}]).encode(f32(values), RNG)
    assert len(frame) == 7 + math.ceil(len(values) / 8)


@pytest.mark.parametrize("stage", [Ternary(), Ternary(alpha=2.0), Sign(scale="mean")])
def test_edges_of_the_scale(stage: Ternary | Sign) -> None:
    np.testing.assert_array_equal(decode(stage, f32([]), 3), [])
    assert not decode(stage, f32([0.0, -0.0, 0.0])).view(np.uint32).any()
    assert np.isfinite(decode(stage, f32([3.4e38, -3.4e38]))).all()
    for bad in (np.nan, np.inf, -np.inf):
        assert np.isnan(decode(stage, f32([-1, bad, 2]), 1)).all()


@pytest.mark.parametrize("scale", ["00000080", "000080bf", "0000807f", "0100c07f", "0000c0ff", "0000"])
def test_scale_that_encoding_does_not_write_is_refused(scale: str) -> None:
    for stage in (Ternary(), Sign(scale="mean")):
        with pytest.raises(FrameError, match="scale"):
            stage.read_table(Reader(bytes.fromhex(scale)), 3)


@pytest.mark.parametrize("scale", ["00000000", "0000c07f"])
def test_sign_of_nothing_is_refused(scale: str) -> None:
    with pytest.raises(FrameError, match="a sign at scale"):
        build_pipeline([{"codec": "ternary"}]).decode(bytes.fromhex("52544631012302" + scale + "02"), 2)


def test_vote_is_never_sent_as_it_is() -> None:
    pipeline = build_pipeline([{"codec": "per-tensor"}, {"codec": "sign", "scale": "mean"}])
    with pytest.raises(FrameError, match="sign does not allow"):
        pipeline.decode(bytes.fromhex("52544631020a240101" + "0000803f"), 1)
    assert len(pipeline.encode(f32([1]), RNG)) == 8 + 1 + 4 + 1


@pytest.mark.parametrize(("codec", "parameter"), [("ternary", "alpha"), ("sign", "scale")])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e31, float("nan")])
def test_scale_out_of_bounds_is_refused(codec: str, parameter: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=parameter):
        build_pipeline([{"codec": codec, parameter: value}])
