"""Plans: the answer keeps the budget, and a little more would not."""

from __future__ import annotations

import math

import pytest

from fedcore.errors import InvalidInput
from fedprivacy.accountant import epsilon_rdp
from fedprivacy.events import Adjacency, Gaussian, History, Release, Rqm, Unit
from fedprivacy.planning import (
    MAX_MULTIPLIER,
    MAX_STEPS,
    MIN_MULTIPLIER,
    best_epsilon,
    epsilon_over_steps,
    gaussian_steps,
    noise_multiplier_for,
    sampling_of,
    steps_within,
)


def once(multiplier: float) -> History:
    return gaussian_steps(multiplier, 1, sampling_of(1))


@pytest.mark.parametrize(("epsilon", "expected"), [(3, 0.8136)])
def test_noise_multiplier_is_the_reference_value(epsilon: float, expected: float) -> None:
    found = noise_multiplier_for(epsilon, 1e-5, lambda z: gaussian_steps(z, 1000, sampling_of(0.01)))
    assert expected - 1e-4 <= found <= expected * (1 + 2e-4)
    assert best_epsilon(gaussian_steps(found, 1000, sampling_of(0.01)), 1e-5) <= epsilon


@pytest.mark.parametrize(("epsilon", "expected"), [(1, 3.7306), (8, 0.6002)])
def test_noise_multiplier_of_one_release_is_the_reference_value(epsilon: float, expected: float) -> None:
    assert noise_multiplier_for(epsilon, 1e-5, once) == pytest.approx(expected, rel=3e-4)


def test_noise_multipliers_have_bounds() -> None:
    assert noise_multiplier_for(1e6, 1e-5, once) == MIN_MULTIPLIER
    with pytest.raises(InvalidInput, match="epsilon 1e-12: no noise multiplier up to"):
        noise_multiplier_for(1e-12, 1e-5, lambda z: gaussian_steps(z, 10**9, sampling_of(1)))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_budgets_are_above_zero(epsilon: float) -> None:
    for plan in (noise_multiplier_for, steps_within):
        with pytest.raises(InvalidInput, match=r"epsilon .*: a number above 0 is needed"):
            plan(epsilon, 1e-5, once)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_sampling_is_a_probability(rate: float) -> None:
    with pytest.raises(InvalidInput, match=r"sampling .*: a probability above 0 and at most 1"):
        sampling_of(rate)


def test_one_step_more_would_pass_the_budget() -> None:
    for epsilon, rate in ((3.0, 0.05), (8.0, 1.0)):

        def after(steps: int, rate: float = rate) -> History:
            return gaussian_steps(1.5, steps, sampling_of(rate))

        steps = steps_within(epsilon, 1e-5, after)
        assert best_epsilon(after(steps), 1e-5) <= epsilon < best_epsilon(after(steps + 1), 1e-5)


def test_steps_of_levels_are_planned_too() -> None:
    def after(steps: int) -> History:
        release = Release(mechanisms=(Rqm(clients=3, levels=8, dimension=16, l2_clip=0.2),), count=steps)
        return History(unit=Unit.CLIENT, adjacency=Adjacency.REPLACE, releases=(release,))

    steps = steps_within(8.0, 1e-5, after)
    assert steps > 0
    assert best_epsilon(after(steps), 1e-5) <= 8.0 < best_epsilon(after(steps + 1), 1e-5)


def test_budgets_of_no_step_and_of_more_steps_than_can_be() -> None:
    assert steps_within(0.01, 1e-5, lambda steps: gaussian_steps(1.0, steps, sampling_of(1))) == 0
    assert steps_within(50.0, 1e-5, lambda steps: gaussian_steps(1e6, steps, sampling_of(1))) == MAX_STEPS


def test_epsilon_grows_over_the_steps_up_to_the_last() -> None:
    points = epsilon_over_steps(100, 1e-5, lambda steps: gaussian_steps(1.0, steps, sampling_of(0.1)), num=5)
    assert [point.steps for point in points] == [1, 25, 50, 75, 100]
    epsilons = [point.epsilon for point in points]
    assert epsilons == sorted(epsilons)
    assert all(point.epsilon <= point.epsilon_rdp for point in points)
    assert [point.steps for point in epsilon_over_steps(1, 1e-5, lambda steps: once(1.0))] == [1]


def test_a_budget_that_only_loss_distributions_keep_is_solved_for() -> None:
    """One release with noise 2 costs 1.993 by PLD and over 2.1 by RDP; what is left is for ten with other noise."""
    fixed = Release(mechanisms=(Gaussian(noise_multiplier=2.0),))

    def history(multiplier: float) -> History:
        more = Release(mechanisms=(Gaussian(noise_multiplier=multiplier),), count=10)
        return History(unit=Unit.CLIENT, releases=(fixed, more))

    assert epsilon_rdp(history(MAX_MULTIPLIER), 1e-5) > 2.1
    found = noise_multiplier_for(2.1, 1e-5, history)
    # All of it together is one Gaussian sum, whose multiplier for epsilon 2.1 is known by itself.
    alone = noise_multiplier_for(2.1, 1e-5, lambda each: gaussian_steps(each, 1, sampling_of(1)))
    assert 2.0**-2 + 10 * found**-2 == pytest.approx(alone**-2, rel=1e-3)
