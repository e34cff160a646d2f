"""Clipping and noise, by what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedcodec import build_pipeline
from fedcodec.transforms import Clip, GaussianNoise
from fedcore.draws import PrivateDraws
from fedcore.errors import InvalidInput
from fedcore.layout import Vector

vectors = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
)


def length(values: Vector) -> float:
    return math.sqrt(math.fsum(float(value) ** 2 for value in values))


@given(values=vectors, norm=st.floats(1e-10, 1e10))
def test_no_clipped_vector_is_longer_than_the_norm_nor_turned(values: Vector, norm: float) -> None:
    clipped = Clip(norm=norm).apply(values, np.random.default_rng(0))
    if length(values) <= norm * (1 - 1e-12):
        assert clipped.tobytes() == values.tobytes()
        return
    assert length(clipped) <= norm
    np.testing.assert_allclose(clipped, values * (norm / length(values)), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(wrong: float) -> None:
    values = np.array([1, wrong, 2], dtype=np.float32)
    assert not np.isfinite(Clip().apply(values, np.random.default_rng(0))).all()
    assert not np.isfinite(GaussianNoise().apply(values, np.random.default_rng(0))).all()


@pytest.mark.parametrize("draws", [np.random.default_rng(0), PrivateDraws(b"s")])
def test_noise_is_normal_and_leaves_the_values_alone(draws: np.random.Generator | PrivateDraws) -> None:
    values = np.linspace(-1, 1, 100_001, dtype=np.float32)
    before = values.copy()
    noisy = GaussianNoise(std=0.25).apply(values, draws)
    assert values.tobytes() == before.tobytes()
    assert noisy.dtype == np.float32
    assert stats.kstest((noisy - values) / 0.25, "norm").pvalue > 1e-6


def test_order_is_clip_noise_and_then_the_rest() -> None:
    pipeline = build_pipeline([{"codec": "clip"}, {"codec": "gaussian-noise", "std": 1e-6}, {"codec": "top-k"}])
    decoded = pipeline.decode(pipeline.encode(np.full(4, 9, np.float32), PrivateDraws(b"s")), 4)
    assert np.flatnonzero(decoded).size == 1
    assert decoded.max() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (["gaussian-noise", "clip"], "clip bounds the norm, so it cannot follow gaussian-noise, which adds noise"),
        (["top-k", "clip"], "clip bounds the norm, so it cannot follow top-k, which selects values"),
        (["gaussian-noise"], "gaussian-noise hides no more than the norm allows: put clip before it"),
        (["top-k", "rqm"], "rqm hides values, but top-k before it sends where the large ones are"),
        (["threshold", "rqm"], "rqm hides values, but threshold before it sends where the large ones are"),
    ],
)
def test_what_would_undo_privacy_is_refused(stages: list[str], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        build_pipeline([{"codec": stage} for stage in stages])


def test_rqm_goes_with_positions_that_tell_nothing() -> None:
    assert build_pipeline([{"codec": "clip"}, {"codec": "rand-k"}, {"codec": "rqm"}]).traits.private_draws
