"""Before anything runs: the noise that a budget needs, the steps that it allows, and epsilon over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from fedcore.errors import InvalidInput
from fedprivacy.accountant import check_delta, epsilon_pld, epsilon_rdp
from fedprivacy.events import Adjacency, Everyone, Gaussian, History, Poisson, Release, Sampling, Trust, Unit

MIN_MULTIPLIER: Final = 0.01
MAX_MULTIPLIER: Final = 1e6
MAX_STEPS: Final = 10**7
TOLERANCE: Final = 1e-4
"""How far above the smallest multiplier that does an answer may lie, relatively."""


@dataclass(frozen=True)
class Point:
    """Epsilon after some steps."""

    steps: int
    epsilon: float
    epsilon_rdp: float


def gaussian_steps(
    noise_multiplier: float,
    steps: int,
    sampling: Sampling,
    *,
    unit: Unit = Unit.EXAMPLE,
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE,
    trust: Trust = Trust.CENTRAL,
) -> History:
    """Return the history of DP-SGD, or of DP-FedAvg if the unit is a client."""
    release = Release(mechanisms=(Gaussian(noise_multiplier=noise_multiplier),), sampling=sampling, count=steps)
    return History(unit=unit, adjacency=adjacency, trust=trust, releases=(release,))


def sampling_of(rate: float) -> Sampling:
    """Return Poisson sampling with that rate; 1 is nobody drawn.

    Raises:
        InvalidInput: the rate is not above 0 and at most 1.
    """
    if not 0 < rate <= 1:
        raise InvalidInput(f"sampling {rate}: a probability above 0 and at most 1 is needed")
    return Everyone() if rate == 1 else Poisson(rate=rate)


def best_epsilon(history: History, delta: float) -> float:
    """Return the smaller of the two accountants' epsilons, which `guarantee` states too."""
    by_pld = epsilon_pld(history, delta)
    by_rdp = epsilon_rdp(history, delta)
    return by_rdp if by_pld is None else min(by_pld, by_rdp)


def noise_multiplier_for(epsilon: float, delta: float, history_with: Callable[[float], History]) -> float:
    """Return a noise multiplier that keeps epsilon, at most `TOLERANCE` above the smallest.

    Args:
        epsilon: what may be spent.
        delta: with which chance that need not hold.
        history_with: the history for a multiplier; more noise must cost less.

    Raises:
        InvalidInput: `epsilon` or `delta` is out of bounds, or no multiplier up to `MAX_MULTIPLIER` is enough.
    """
    _check(epsilon, delta)

    def excess(measure: Callable[[History, float], float], multiplier: float) -> float:
        spent = measure(history_with(multiplier), delta)
        return math.log(max(spent, 1e-300) / epsilon)

    by_rdp, by_best = partial(excess, epsilon_rdp), partial(excess, best_epsilon)
    if by_rdp(MAX_MULTIPLIER) > 0:
        if by_best(MAX_MULTIPLIER) > 0:
            raise InvalidInput(f"epsilon {epsilon:g}: no noise multiplier up to {MAX_MULTIPLIER:g} keeps it")
        return _smallest(MIN_MULTIPLIER, MAX_MULTIPLIER, by_best)  # slow, and rare: what is fixed costs nearly all
    if by_rdp(MIN_MULTIPLIER) <= 0:
        return MIN_MULTIPLIER
    # Rényi divergences are quick, and what is enough for them is enough.
    high = _smallest(MIN_MULTIPLIER, MAX_MULTIPLIER, by_rdp)
    low = high / 1.15
    while by_best(low) <= 0:
        low, high = low / 1.15, low
        if high <= MIN_MULTIPLIER:
            return MIN_MULTIPLIER
    return _smallest(low, high, by_best)


def steps_within(epsilon: float, delta: float, history_after: Callable[[int], History]) -> int:
    """Return the largest number of steps, up to `MAX_STEPS`, that keeps epsilon; 0 if none does.

    Raises:
        InvalidInput: `epsilon` or `delta` is out of bounds.
    """
    _check(epsilon, delta)

    def largest(fits: Callable[[int], bool], done: int, step: int) -> int:
        """Return the largest that fits, of which `done` is one: by doubling, then by halves."""
        while done < MAX_STEPS and fits(min(done + step, MAX_STEPS)):
            done, step = min(done + step, MAX_STEPS), 2 * step
        while step > 1:
            step = (step + 1) // 2
            if done + step <= MAX_STEPS and fits(done + step):
                done += step
        return done

    by_rdp = largest(lambda steps: epsilon_rdp(history_after(steps), delta) <= epsilon, 0, 1)
    return largest(lambda steps: best_epsilon(history_after(steps), delta) <= epsilon, by_rdp, by_rdp // 8 + 1)


def epsilon_over_steps(steps: int, delta: float, history_after: Callable[[int], History], num: int = 24) -> list[Point]:
    """Return epsilon after about `num` numbers of steps, the last one `steps`."""
    check_delta(delta)
    counts = sorted({max(1, round(count)) for count in np.linspace(0, steps, num)})
    histories = [(count, history_after(count)) for count in counts]
    return [Point(count, best_epsilon(each, delta), epsilon_rdp(each, delta)) for count, each in histories]


def _check(epsilon: float, delta: float) -> None:
    check_delta(delta)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise InvalidInput(f"epsilon {epsilon}: a number above 0 is needed")


def _smallest(low: float, high: float, excess: Callable[[float], float]) -> float:
    """Return a value between where nothing is in excess, near the smallest; at `high` nothing is, at `low` it is.

    On logarithmic scales excess is nearly straight, so the root of a chord is tried, and now and then the middle.
    """
    at_low, at_high = excess(low), excess(high)
    turn = 0
    while high / low > 1 + TOLERANCE:
        share = 0.5
        if turn % 3 < 2 and math.isfinite(at_low) and at_low > 0 > at_high:
            share = at_low / (at_low - at_high)
        # A little beyond the root, to find the other end next to it.
        middle = low * (high / low) ** share * (1 + TOLERANCE / 3)
        middle = min(max(middle, low * (1 + TOLERANCE / 2)), high / (1 + TOLERANCE / 2))
        found = excess(middle)
        if found <= 0:
            high, at_high = middle, found
        else:
            low, at_low = middle, found
        turn += 1
    return high
