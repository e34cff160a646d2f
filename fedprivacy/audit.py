"""Audit: a lower bound on epsilon, from how well two neighbouring inputs are told apart.

An accountant bounds from above what a mechanism says, if the code does as stated. This bounds from below what the code
does say, whatever it does: where the two cross, the code or the claim is wrong. If a release is (ε, δ)-private, then
for neighbours x and x' and every event E: P(E | x) ≤ e^ε P(E | x') + δ. So, with bounds on both chances from trials,

    ε ≥ log((P_low(E | x) − δ) / P_high(E | x')).

Jagielski, Ullman, Oprea: Auditing Differentially Private Machine Learning: How Private is Private SGD?, 2020, section
3; Nasr and others: Adversary Instantiation: Lower Bounds for Differentially Private Machine Learning, 2021. The bounds
on the chances are Clopper's and Pearson's (1934), each one-sided, which hold for any number of trials.

Legend of shapes: N trials with one input, M with the other, K events.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from fedcore.draws import PrivateDraws
from fedcore.errors import ConfigError, InvalidInput
from fedprivacy.accountant import ACCOUNTING_MISSING, check_delta
from fedprivacy.levels import Array

FALSE_ALARM: Final = 1e-6
_EVENTS: Final = 256
"""At most so many thresholds are tried, on trials that do not count."""

InputT = TypeVar("InputT")


@dataclass(frozen=True)
class Audit:
    """What two inputs were told apart by.

    Attributes:
        epsilon: no epsilon below it is true at this delta, but for `false_alarm`; at least 0.
        delta: what the claim allows besides.
        false_alarm: chance that `epsilon` lies above that of the mechanism.
        event: which statistics tell: ``"first > 1.5"`` is those of the first input above 1.5.
        likely: lower bound on the chance of the event with the input that it tells.
        unlikely: upper bound on it with the other one.
        trials: how many of both inputs decided, half of all.
    """

    epsilon: float
    delta: float
    false_alarm: float
    event: str
    likely: float
    unlikely: float
    trials: int


def audit(
    mechanism: Callable[[InputT, PrivateDraws], npt.ArrayLike],
    first: InputT,
    second: InputT,
    delta: float,
    *,
    trials: int,
    false_alarm: float = FALSE_ALARM,
    secret: bytes | None = None,
) -> Audit:
    """Run a mechanism on two neighbouring inputs and bound its epsilon from below.

    Args:
        mechanism: makes a release of an input and returns a statistic of it, or several of independent releases; the
            larger, the likelier the first input. A projection on what the inputs differ by is the best one for normal
            noise; for levels it is the likelihood ratio.
        first: a worst case, such as one example more whose gradient is longer than the clip.
        second: its neighbour.
        delta: at which the claim is made. A larger one needs fewer trials to be tested.
        trials: statistics of each input, at least.
        false_alarm: see `Audit`.
        secret: what all draws follow from, to have the same ones again; by default the operating system's entropy.

    Raises:
        InvalidInput: `delta`, `false_alarm` or `trials` is out of bounds, or a statistic is NaN.
        ConfigError: scipy, which the accountant brings, is not installed.
    """
    secret = os.urandom(32) if secret is None else secret

    def statistics(given: InputT, name: bytes) -> Array:
        found, missing = [np.zeros(0)], trials
        while missing > 0:
            draws = PrivateDraws(secret, name, len(found).to_bytes(8, "little"))
            found.append(np.atleast_1d(np.asarray(mechanism(given, draws), dtype=np.float64)))
            missing -= max(found[-1].size, 1)
        return np.concatenate(found)

    return lower_bound(statistics(first, b"first"), statistics(second, b"second"), delta, false_alarm=false_alarm)


def lower_bound(first_N: Array, second_M: Array, delta: float, *, false_alarm: float = FALSE_ALARM) -> Audit:
    """Return a lower bound on epsilon from statistics of two neighbouring inputs.

    An event is that the statistic is above, or not above, a threshold; it may tell either input. One half of the
    trials chooses it, the other half decides: so there is one event to pay for, two bounds of half of `false_alarm`.

    Args:
        first_N: a statistic of each release of one input; independent of each other.
        second_M: of the other.
        delta: at which the claim is made.
        false_alarm: chance that what is returned lies above the epsilon of the mechanism.

    Raises:
        InvalidInput: `delta` or `false_alarm` is not between 0 and 1, there are less than two statistics of an input,
            or one is NaN.
        ConfigError: scipy, which the accountant brings, is not installed.
    """
    check_delta(delta)
    if not 0 < false_alarm < 1:
        raise InvalidInput(f"false_alarm {false_alarm}: above 0 and below 1 is needed")
    for name, found in (("first", first_N), ("second", second_M)):
        if found.size < 2 or np.isnan(found).any():
            raise InvalidInput(
                f"{found.size} statistics of the {name} input: at least two are needed, none of them NaN"
            )

    def bounds(first: Array, second: Array, at: Array) -> tuple[Array, Array]:
        """Return, 4 × K, `likely` and `unlikely` of: first above, first not above, second above, second not above."""
        above_2K = [each.size - np.searchsorted(np.sort(each), at, side="right") for each in (first, second)]
        hits_4K = np.stack([above_2K[0], first.size - above_2K[0], above_2K[1], second.size - above_2K[1]])
        sizes_4 = np.array([[first.size], [first.size], [second.size], [second.size]])
        low_4K, high_4K = rate_bounds(hits_4K, sizes_4, false_alarm / 2)
        return low_4K, high_4K[[2, 3, 0, 1]]

    pooled = np.concatenate([first_N[::2], second_M[::2]])
    thresholds = np.unique(np.quantile(pooled, np.linspace(0, 1, _EVENTS), method="lower"))
    tried = _epsilons(*bounds(first_N[::2], second_M[::2], thresholds), delta)
    kind, best = np.unravel_index(int(tried.argmax()), tried.shape)
    threshold = float(thresholds[best])
    low_4K, high_4K = bounds(first_N[1::2], second_M[1::2], np.array([threshold]))
    return Audit(
        epsilon=float(_epsilons(low_4K, high_4K, delta)[kind, 0]),
        delta=delta,
        false_alarm=false_alarm,
        event=f"{('first', 'second')[kind // 2]} {('>', '<=')[kind % 2]} {threshold:.6g}",
        likely=float(low_4K[kind, 0]),
        unlikely=float(high_4K[kind, 0]),
        trials=first_N.size // 2 + second_M.size // 2,
    )


def rate_bounds(hits: npt.ArrayLike, trials: npt.ArrayLike, error: float) -> tuple[Array, Array]:
    """Return a lower and an upper bound on the chance of an event, each wrong with a chance of at most `error`.

    Clopper, Pearson: The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934.

    Args:
        hits: how often it happened.
        trials: of how many, of the same shape or one that broadcasts.
        error: between 0 and 1.

    Raises:
        ConfigError: scipy, which the accountant brings, is not installed.
    """
    try:
        from scipy.special import betaincinv
    except ImportError as missing:
        raise ConfigError(ACCOUNTING_MISSING) from missing

    hits = np.asarray(hits, dtype=np.float64)
    misses = np.asarray(trials, dtype=np.float64) - hits
    low = np.where(hits > 0, betaincinv(np.maximum(hits, 1), misses + 1, error), 0.0)
    high = np.where(misses > 0, betaincinv(hits + 1, np.maximum(misses, 1), 1 - error), 1.0)
    return low, high


def _epsilons(likely: Array, unlikely: Array, delta: float) -> Array:
    return np.log(np.maximum((likely - delta) / unlikely, 1.0))
