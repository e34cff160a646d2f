"""The Poisson binomial mechanism against reference values computed apart, and against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedprivacy.events import Pbm, Rqm
from fedprivacy.pbm import max_log_ratio, variance, worst_divergence
from fedprivacy.rqm import worst_case

Array = npt.NDArray[np.float64]
ORDERS = (1.5, 2, 4, 8, 16, 32)
REFERENCE = {
    (15, 1): (11.009538, 12.709468, 15.043060, 15.862723, 16.191502, 16.339983),
    (16, 1): (11.743507, 13.556766, 16.045930, 16.920238, 17.270936, 17.429316),
    (15, 10): (1.634500, 2.280115, 5.404683, 10.435332, 13.602858, 15.087174),
    (16, 10): (1.743007, 2.431452, 5.764161, 11.131005, 14.509715, 16.092986),
    (15, 40): (0.383751, 0.517531, 1.085879, 2.421145, 6.036318, 10.934255),
    (16, 40): (0.409306, 0.551993, 1.158175, 2.582282, 6.438503, 11.663204),
}


@pytest.mark.parametrize(("trials", "clients"), REFERENCE)
def test_worst_case_is_the_reference_value(trials: int, clients: int) -> None:
    found = worst_divergence(Pbm(trials=trials, clients=clients), ORDERS)
    assert found == pytest.approx(REFERENCE[trials, clients], abs=2e-6)


def test_variance_is_the_reference_value() -> None:
    assert variance(Pbm(trials=15)) == pytest.approx(0.2667, abs=5e-5)
    assert variance(Pbm(trials=16)) == pytest.approx(0.25)


@settings(max_examples=30)
@given(
    st.integers(1, 4), st.floats(0.05, 0.45), st.lists(st.floats(-1, 1), max_size=3), st.floats(-1, 1), st.floats(-1, 1)
)
def test_no_inputs_do_worse(trials: int, theta: float, rest: list[float], x: float, y: float) -> None:
    def summed(value: float) -> Array:
        total = np.ones(1)
        for each in (value, *rest):
            total = np.convolve(total, binom.pmf(np.arange(trials + 1), trials, 0.5 + theta * each))
        return total

    p, q = summed(x), summed(y)
    event = Pbm(trials=trials, theta=theta, clients=len(rest) + 1)
    for order, bound in zip((1.5, 6), worst_divergence(event, (1.5, 6)), strict=True):
        assert math.log(float((p**order * q ** (1 - order)).sum())) / (order - 1) <= bound * (1 + 1e-9) + 1e-12


def test_extremes_reach_it() -> None:
    event = Pbm(trials=3, theta=0.3, clients=2)
    parts = [binom.pmf(np.arange(4), 3, 0.5 + 0.3 * sign) for sign in (-1, 1)]
    sums = [(np.convolve(x, rest), np.convolve(y, rest)) for rest in parts for x, y in itertools.permutations(parts)]
    worst = max(math.log(float((p**5 * q**-4.0).sum())) / 4 for p, q in sums)
    assert worst_divergence(event, (5,)) == pytest.approx([worst], rel=1e-9)


def test_infinite_and_large_orders_are_the_pure_guarantee() -> None:
    event = Pbm(trials=15)
    assert worst_divergence(event, (math.inf, 1e4)).tolist() == [max_log_ratio(event)] * 2
    assert max_log_ratio(event) == pytest.approx(15 * math.log(3))
    many = worst_divergence(Pbm(trials=15, clients=10**6), (2,))
    assert 0 < many[0] < worst_divergence(Pbm(trials=15, clients=40), (2,))[0]


def test_rqm_costs_less_than_it_with_as_many_bits_and_no_more_variance() -> None:
    for clients in (1, 40):
        found = worst_case(Rqm(clients=clients), ORDERS).found
        assert found is not None
        assert (found < worst_divergence(Pbm(trials=15, clients=clients), ORDERS)).all()
