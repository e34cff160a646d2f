"""The lower bound on epsilon against mechanisms whose epsilon is known, and its confidence against the binomial."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fedcore.draws import PrivateDraws
from fedcore.errors import InvalidInput
from fedprivacy.audit import audit, lower_bound, rate_bounds

Array = npt.NDArray[np.float64]


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-9, 0.4))
def test_rates_are_bounded_with_the_confidence_that_is_stated(trials: int, share: float, error: float) -> None:
    hits = round(share * trials)
    low, high = rate_bounds(hits, trials, error)
    assert 0 <= low <= hits / trials <= high <= 1
    # A lower rate would give so many hits with less than that chance; a higher one so few.
    assert low == 0 if hits == 0 else binom.sf(hits - 1, trials, low) == pytest.approx(error, rel=1e-5)
    assert high == 1 if hits == trials else binom.cdf(hits, trials, high) == pytest.approx(error, rel=1e-5)


def coins(chance: float, draws: PrivateDraws) -> Array:
    return (draws.random(2000) < chance).astype(np.float64)


def test_randomised_response_costs_what_is_known() -> None:
    found = audit(coins, 0.75, 0.25, 1e-9, trials=200_000, secret=b"s")
    assert 0.95 * math.log(3) < found.epsilon <= math.log(3)
    assert found.likely <= 0.75
    assert found.unlikely >= 0.25
    assert found.trials == 200_000
    assert audit(coins, 0.75, 0.25, 0.1, trials=200_000, secret=b"s").epsilon <= math.log(2.6)


@pytest.mark.parametrize("shift", [1.0, -1.0])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0)])
def test_whichever_input_and_side_tells_most_is_found(shift: float, scales: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, scales[0], 100_000), rng.normal(shift, scales[1], 100_000)
    found = lower_bound(first, second, 0.01)
    name, sign, number = found.event.split()
    distributions = {"first": norm(0, scales[0]), "second": norm(shift, scales[1])}
    told = distributions.pop(name)
    (other,) = distributions.values()
    chances = [each.sf(float(number)) if sign == ">" else each.cdf(float(number)) for each in (told, other)]
    assert found.likely < chances[0]
    assert found.unlikely > chances[1]
    epsilon = math.log((chances[0] - 0.01) / chances[1])
    assert 0.6 * epsilon < found.epsilon < epsilon
    # The wider one is told by its tails, where the narrow one hardly comes.
    if scales[0] != scales[1]:
        assert name == ("first" if scales[0] > scales[1] else "second")


def test_false_alarms_are_no_more_frequent_than_stated() -> None:
    """Of 600 audits of a mechanism at its exact epsilon, each of which errs once in ten: 100 err once in a million."""
    rng = np.random.default_rng(1)
    worst = max(math.log(max((norm.sf(at - 1) - 0.05) / norm.sf(at), 1)) for at in np.linspace(-2, 3, 501))
    alarms = sum(
        lower_bound(rng.normal(1, 1, 300), rng.normal(0, 1, 300), 0.05, false_alarm=0.1).epsilon > worst
        for _ in range(600)
    )
    assert binom.sf(99, 600, 0.1) < 1e-6
    assert alarms < 100


def test_what_cannot_be_told_apart_costs_nothing() -> None:
    assert audit(coins, 0.5, 0.5, 1e-9, trials=10_000, secret=b"s").epsilon < 0.05
    assert audit(lambda _, draws: 1.0, 0, 1, 0.01, trials=50).epsilon == 0
    assert audit(coins, 0.75, 0.25, 0.8, trials=10_000, secret=b"s").epsilon == 0


def test_no_hits_at_all_bound_a_rate_from_above_too() -> None:
    found = audit(lambda given, draws: given, 1.0, 0.0, 0.01, trials=2000)
    assert found.epsilon == pytest.approx(math.log((found.likely - 0.01) / found.unlikely))
    assert 3 < found.epsilon < math.log(2000)
    assert lower_bound(np.full(9, np.inf), np.full(9, -np.inf), 0.01, false_alarm=0.5).epsilon > 0


def test_draws_are_independent_and_follow_from_the_secret() -> None:
    seen: list[float] = []

    def draw(given: int, draws: PrivateDraws) -> float:
        seen.append(float(draws.random(1)[0]))
        return seen[-1]

    results = [audit(draw, 0, 1, 0.01, trials=10, secret=secret) for secret in (b"a", b"a", b"b", None, None)]
    assert results[0] == results[1]
    assert seen[:20] == seen[20:40]
    assert len(set(seen)) == 80


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"delta": 0.0}, "delta 0.0"),
        ({"delta": 1.0}, "delta 1.0"),
        ({"false_alarm": 0.0}, "false_alarm 0.0: above 0"),
        ({"false_alarm": 1.0}, "false_alarm 1.0"),
        ({"first_N": np.zeros(1)}, "1 statistics of the first input"),
        ({"second_M": np.zeros(0)}, "0 statistics of the second input"),
        ({"second_M": np.array([0, np.nan])}, "none of them NaN"),
    ],
)
def test_arguments_have_bounds(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        lower_bound(**{"first_N": np.zeros(9), "second_M": np.zeros(9), "delta": 0.1, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("trials", [-1, 0, 1])
def test_too_few_trials_are_refused(trials: int) -> None:
    with pytest.raises(InvalidInput, match="at least two are needed"):
        audit(coins if trials < 1 else lambda given, draws: 0.0, 0.75, 0.25, 0.01, trials=trials)
    with pytest.raises(InvalidInput, match="0 statistics"):
        audit(lambda given, draws: [], 0.75, 0.25, 0.01, trials=5)
