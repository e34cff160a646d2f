"""Mechanisms as audits call them, the worst inputs of some, claims, and bugs to plant in the real code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedcodec.quantisers import rqm
from fedcodec.transforms import Clip
from fedcore.draws import PrivateDraws
from fedcore.jobfile import Job
from fedprivacy.accountant import guarantee
from fedprivacy.events import Adjacency, History, Mechanism, Release, Trust, Unit
from fedprivacy.jobs import Accounting, Round
from fedprivacy.planning import sampling_of
from tests.support.exports import make_job

Array = npt.NDArray[np.float64]
Plant = Callable[[pytest.MonkeyPatch], None]


def claim(
    delta: float,
    *mechanisms: Mechanism,
    adjacency: Adjacency = Adjacency.ZERO_OUT,
    rate: float = 1.0,
    count: int = 1,
) -> float:
    """Return the epsilon that the accountant states for these releases."""
    release = Release(mechanisms=mechanisms, sampling=sampling_of(rate), count=count)
    history = History(unit=Unit.CLIENT, adjacency=adjacency, trust=Trust.LOCAL, releases=(release,))
    return guarantee(history, delta).epsilon


def private_job(mechanism: str, delta: float, **privacy: Any) -> Job:
    """Return a job with that mechanism; its quorum is 3."""
    weights = {} if mechanism == "dp-sgd" else {"aggregator": {"rule": "weighted-mean", "max_examples": 1}}
    return make_job(privacy={"mechanism": mechanism, "delta": delta, **privacy}, **weights)


def claim_of(job: Job, delta: float, *, clients: int = 3, adjacency: Adjacency | None = None) -> float:
    """Return the epsilon that is stated for one release of a client, or one step, in a job."""
    accounting = Accounting.of(job)
    assert accounting is not None
    once = accounting.trained(Round(clients, clients, clients), 3).model_copy(update={"count": 1})
    return guarantee(
        accounting.history(once).model_copy(update={"adjacency": adjacency or accounting.adjacency}), delta
    ).epsilon


# -- bugs ------------------------------------------------------------------------------------------------------------


def halve_the_noise(patch: pytest.MonkeyPatch) -> None:
    """Normal draws have half their length; RQM passes half as many levels on the way to a kept one."""
    for name in ("standard_normal", "standard_exponential"):
        right = getattr(PrivateDraws, name)
        patch.setattr(PrivateDraws, name, lambda self, size, right=right: right(self, size) / 2)


def skip_the_clip(patch: pytest.MonkeyPatch) -> None:
    """Neither the stage `clip` nor RQM bounds anything."""

    def place(values: Any, levels: int, clip: float, extension: float) -> Any:
        reach = clip + extension
        return np.clip((values + reach) / (2 * reach) * (levels - 1), 0, levels - 1)

    patch.setattr(Clip, "apply", lambda self, values_D, rng: values_D)
    patch.setattr(rqm, "place", place)


# -- levels ----------------------------------------------------------------------------------------------------------


def inputs_of(stage: rqm.Rqm) -> list[float]:
    """Return the ends of the clip and the levels between: where what is said of a value is largest."""
    reach = stage.clip + stage.extension
    levels = np.linspace(-reach, reach, stage.levels)
    return [-stage.clip, *levels[np.abs(levels) < stage.clip * (1 - 1e-9)].tolist(), stage.clip]


def sum_pmf(stage: rqm.Rqm, values: Sequence[float]) -> Array:
    """Return the chance of each sum of the levels of some clients."""
    total = np.ones(1)
    for value in values:
        total = np.convolve(total, rqm.pmf(value, stage.levels, stage.keep, stage.clip, stage.extension))
    return total


def worst_inputs(stage: rqm.Rqm, clients: int, epsilon: float) -> tuple[float, float, tuple[float, ...]]:
    """Return the two values, and those of the others, with the largest hockey-stick divergence at that epsilon."""
    points = inputs_of(stage)

    def divergence(case: tuple[float, float, tuple[float, ...]]) -> float:
        first, second, rest = case
        excess = sum_pmf(stage, (first, *rest)) - np.exp(epsilon) * sum_pmf(stage, (second, *rest))
        return float(np.maximum(excess, 0).sum())

    rests = itertools.combinations_with_replacement(points, clients - 1)
    return max(((*pair, rest) for rest in rests for pair in itertools.permutations(points, 2)), key=divergence)


# -- the Poisson binomial mechanism ----------------------------------------------------------------------------------


def pbm_sums(values: Sequence[float], trials: int, size: int, draws: PrivateDraws) -> npt.NDArray[np.int64]:
    """Return so many sums of the coins of clients with these values, in clips, at theta 1/4.

    Chen, Özgür and Kairouz, 2022, algorithm 1, without clipping, so that values beyond 1 show what that is worth.
    """
    chances_C = np.repeat(0.5 + 0.25 * np.asarray(values), trials)
    heads: npt.NDArray[np.int64] = (draws.random(size * chances_C.size).reshape(size, -1) < chances_C).sum(axis=1)
    return heads
