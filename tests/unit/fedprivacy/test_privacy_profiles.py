"""Privacy profiles against brute force, and losses made from them against exact compositions."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, from_two_probability_mass_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedprivacy.events import Rqm
from fedprivacy.levels import max_log_ratio, pmf, vertex_pmfs
from fedprivacy.profiles import fixed_size_loss, fixed_size_profile, loss_of, rqm_loss, rqm_profile

Array = npt.NDArray[np.float64]
EPSILONS = np.array([0.0, 0.1, 0.7, 2.0, 4.0])
SMALL = st.builds(Rqm, levels=st.integers(2, 5), keep=st.floats(0.1, 0.9), extension=st.floats(0.2, 3))
VALUES = st.floats(-1, 1)


def hockey_stick(p: Array, q: Array, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@given(SMALL, st.lists(VALUES, max_size=2), VALUES, VALUES)
def test_no_inputs_are_told_apart_better_than_the_profile_says(
    event: Rqm, rest: list[float], x: float, y: float
) -> None:
    p, q = pmf(x, event), pmf(y, event)
    for other in rest:
        p, q = np.convolve(p, pmf(other, event)), np.convolve(q, pmf(other, event))
    profile = rqm_profile(event.model_copy(update={"clients": len(rest) + 1}), EPSILONS)
    for epsilon, delta in zip(EPSILONS, profile, strict=True):
        assert hockey_stick(p, q, epsilon) <= delta + 1e-12


@pytest.mark.parametrize("clients", [2, 3])
def test_profile_of_a_sum_is_that_of_every_choice_of_vertices(clients: int) -> None:
    event = Rqm(levels=4, keep=0.3, extension=0.8, clients=clients)
    corners = vertex_pmfs(event)
    worst = np.zeros(EPSILONS.size)
    for rest in itertools.combinations_with_replacement(corners, clients - 1):
        total = functools.reduce(np.convolve, rest)
        for one, other in itertools.permutations(corners, 2):
            p, q = np.convolve(total, one), np.convolve(total, other)
            worst = np.maximum(worst, [hockey_stick(p, q, epsilon) for epsilon in EPSILONS])
    np.testing.assert_allclose(rqm_profile(event, EPSILONS), worst, rtol=1e-9, atol=1e-15)


def test_profile_is_reached_and_ends_at_the_pure_guarantee() -> None:
    event = Rqm()
    profile = rqm_profile(event, EPSILONS)
    for epsilon, delta in zip(EPSILONS, profile, strict=True):
        pairs = itertools.permutations(vertex_pmfs(event), 2)
        assert delta == pytest.approx(max(hockey_stick(p, q, epsilon) for p, q in pairs), rel=1e-9)
    limit = max_log_ratio(event)
    assert rqm_profile(event, np.array([limit + 1e-9])) == pytest.approx([0.0], abs=1e-15)
    assert rqm_profile(event, np.array([limit - 0.01]))[0] > 0


def test_bound_of_many_clients_is_no_less_than_others_alike() -> None:
    event = Rqm(clients=12)
    bound = rqm_profile(event, EPSILONS)
    rest = np.ones(1)
    for _ in range(11):
        rest = np.convolve(rest, pmf(-1.0, event))
    for x, y in itertools.permutations((-1.0, 0.0, 1.0), 2):
        p, q = np.convolve(rest, pmf(x, event)), np.convolve(rest, pmf(y, event))
        assert all(hockey_stick(p, q, epsilon) <= delta for epsilon, delta in zip(EPSILONS, bound, strict=True))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_composition_is_hardly_more_than_the_exact_one_of_two_levels(times: int) -> None:
    # With two levels only two inputs are extreme, so that their products are the worst case of a composition.
    event = Rqm(levels=2)
    p, q = pmf(1.0, event), pmf(-1.0, event)
    for _ in range(times - 1):
        p, q = np.outer(p, pmf(1.0, event)).ravel(), np.outer(q, pmf(-1.0, event)).ravel()
    loss = rqm_loss(event, 1e-3).self_compose(times)
    for epsilon in (0.05, 0.5, 1.0, 2.0, 3.0):
        exact = hockey_stick(p, q, epsilon)
        assert exact - 1e-12 <= loss.get_delta_for_epsilon(epsilon) <= exact + 2e-3


def test_loss_of_one_client_is_that_of_its_worst_pair_by_another_way() -> None:
    one, other = (dict(enumerate(np.log(pmf(x, Rqm())).tolist())) for x in (1.0, -1.0))
    pair = from_two_probability_mass_functions(one, other, value_discretization_interval=1e-3)
    for times in (1, 100):
        found = rqm_loss(Rqm(), 1e-3).self_compose(times).get_epsilon_for_delta(1e-5)
        expected = pair.self_compose(times).get_epsilon_for_delta(1e-5)
        # The pair is the worst for none of these alone, and nearly so for all.
        assert expected * 0.99 <= found <= expected * 1.05


# -- sampling without replacement ------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.floats(0.3, 5), st.floats(0.01, 1), st.floats(0, 3))
def test_fixed_size_profile_is_the_integral(multiplier: float, fraction: float, epsilon: float) -> None:
    # Whoever is replaced was drawn with that chance: N(0) mixed with N(1), against N(0).
    grid = np.linspace(-12 * multiplier, 1 + 12 * multiplier, 40_001)
    lower = norm.pdf(grid, 0, multiplier)
    upper = fraction * norm.pdf(grid, 1, multiplier) + (1 - fraction) * lower
    exact = float(np.trapezoid(np.maximum(upper - math.exp(epsilon) * lower, 0), grid))
    found = fixed_size_profile(multiplier, fraction, np.array([epsilon]))[0]
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-9)


def test_drawing_all_is_the_plain_gaussian() -> None:
    plain = from_gaussian_mechanism(1.3).self_compose(10).get_epsilon_for_delta(1e-6)
    assert fixed_size_loss(1.3, 1.0, 1e-4).self_compose(10).get_epsilon_for_delta(1e-6) == pytest.approx(
        plain, rel=1e-3
    )


def test_one_draw_is_as_good_as_poissons_and_more_are_not() -> None:
    # Poisson sampling is told from one side only; replacing from both, in each step anew.
    loss, poisson = fixed_size_loss(1.0, 0.1, 1e-4), from_gaussian_mechanism(1.0, sampling_prob=0.1)
    once, many = (
        [each.self_compose(times).get_epsilon_for_delta(1e-5) for each in (loss, poisson)] for times in (1, 100)
    )
    assert once[0] == pytest.approx(once[1], rel=1e-4)
    assert many[0] > many[1] * 1.05


def test_profile_that_does_not_fall_is_lifted_not_lowered() -> None:
    steps = np.array([0, 100, 200])
    loss = loss_of(steps, np.array([0.2, 0.1, 0.1 + 1e-12]), 1e-2)
    assert loss.get_delta_for_epsilon(1.0) >= 0.1 + 1e-12
