"""Whole vectors: never longer than the clip, also in float32; noise of the variance that is accounted for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from fedclient.clipping import clipped, noise_of_a_client, noised
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Vector
from tests.support.private import draws_of

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays.arrays(np.float32, st.integers(1, 40), elements=FLOATS)
CLIPS = st.floats(1e-300, 1e6) | st.floats(1e-46, 1e-36) | st.floats(0.1, 10)


def norm(values_D: Vector) -> float:
    """Return the norm, summed exactly."""
    exact = [float(value) for value in values_D]
    largest = max(map(abs, exact))
    return 0.0 if largest == 0 else largest * math.sqrt(math.fsum((value / largest) ** 2 for value in exact))


@given(VECTORS, CLIPS)
def test_a_clipped_vector_is_never_longer_and_points_the_same_way(values_D: Vector, clip: float) -> None:
    found_D = clipped(values_D, clip)
    assert found_D.dtype == np.float32
    assert norm(found_D) <= clip
    assert (np.sign(found_D) * np.sign(values_D) >= 0).all()
    assert (np.abs(found_D) <= np.abs(values_D)).all()
    if norm(values_D) <= clip * (1 - 1e-6):
        assert found_D.tobytes() == values_D.tobytes()
    elif clip > 1e-30:
        assert norm(found_D) >= clip * (1 - 1e-6)


@pytest.mark.parametrize("size", [1, 10, 100_000])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 0.1, 1e6])
def test_a_long_vector_is_never_longer_than_the_clip(size: int, clip: float) -> None:
    values_D = np.random.default_rng(size).standard_normal(size).astype(np.float32) * np.float32(1e8)
    assert clip * (1 - 1e-6) < norm(clipped(values_D, clip)) <= clip


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_what_is_not_finite_becomes_zeros(bad: float, clip: float) -> None:
    assert not clipped(np.array([1, bad, 2], np.float32), clip).any()


def test_the_largest_values_are_no_overflow() -> None:
    values_D = np.full(100, np.finfo(np.float32).max, np.float32)
    np.testing.assert_allclose(clipped(values_D, 1.0), 0.1, rtol=1e-6)
    assert clipped(values_D, math.inf).tobytes() == values_D.tobytes()


def test_noise_is_added_with_its_deviation() -> None:
    """Chi-square with 20,000 degrees of freedom; a right program fails with probability 1e-9 (two-sided)."""
    values_D = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    found_D = noised(values_D, 3.0, draws_of())
    assert found_D.dtype == np.float32
    noise_D = (found_D.astype(np.float64) - values_D) / 3
    low, high = stats.chi2(noise_D.size).ppf([0.5e-9, 1 - 0.5e-9])
    assert low < noise_D @ noise_D < high
    assert noised(values_D, 3.0, draws_of()).tobytes() == found_D.tobytes()
    assert abs(np.corrcoef(noise_D, noised(values_D, 3.0, draws_of(2)) - values_D)[0, 1]) < 0.06
    assert noised(values_D, 0.0, draws_of()).tobytes() == values_D.tobytes()


def job(**privacy: object) -> Job:
    tree: dict[str, object] = {
        "job": {"name": "j", "rounds": 2},
        "task": {"name": "digits"},
        "schedule": {"cohort": 12, "quorum": 9, "buffer": 12},
        "aggregator": {"max_examples": 1},
    }
    if privacy.get("mechanism") == "rqm":
        tree["compression"] = {"uplink": [{"codec": "clip"}, {"codec": "rqm"}]}
    return parse_job({**tree, "privacy": {"delta": 1e-5, **privacy}} if privacy else tree, "test")


GAUSSIAN = {"clip": 0.5, "noise_multiplier": 2.0}


@pytest.mark.parametrize(
    ("privacy", "std"),
    [
        ({}, 0.0),
        ({"mechanism": "dp-fedavg", "noise": "server", **GAUSSIAN}, 0.0),
        ({"mechanism": "dp-fedavg", "noise": "clients", **GAUSSIAN}, 1.0 / 3),
        ({"mechanism": "dp-fedavg", "noise": "local", **GAUSSIAN}, 1.0),
        ({"mechanism": "dp-lora-paper", **GAUSSIAN}, 1.0),
        ({"mechanism": "dp-sgd", "sampling": 0.1, **GAUSSIAN}, 0.0),
        ({"mechanism": "rqm", "trust": "local"}, 1.0),
        ({"mechanism": "rqm", "trust": "central"}, 1.0),
    ],
)
def test_who_adds_noise(privacy: dict[str, object], std: float) -> None:
    assert noise_of_a_client(job(**privacy), 2.0, 0.5) == pytest.approx(std)
