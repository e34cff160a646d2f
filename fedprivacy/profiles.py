"""Privacy profiles: δ(ε), the largest hockey-stick divergence, and privacy loss distributions made from them.

The largest of convex functions is convex, so that the profile of a worst case over many pairs is that of one pair,
which need not be among them (Zhu, Dong, Wang: Optimal Accounting of Differential Privacy via Characteristic Function,
2022). That pair dominates all others and composes; straight lines between its points in e^ε do not lower it
(Doroshenko et al.: Connect the Dots, 2022). All profiles here are of relations that are the same both ways: δ(−ε) = 1
− e^−ε + e^−ε δ(ε).

Legend of shapes: E values of ε, V vertices, Z levels of a sum, N sums of others.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np

from fedprivacy.events import Rqm
from fedprivacy.levels import Array, max_log_ratio, vertex_pmfs
from fedprivacy.others import convolve, few_or_cores
from fedprivacy.rqm import places

_NUM_POINTS: Final = 256
_TAIL: Final = 10.0
"""Standard deviations of the loss after which the rest of a normal distribution counts as no privacy at all."""


def rqm_profile(event: Rqm, epsilons_E: Array) -> Array:
    """Return δ for each ε ≥ 0 of one value: exact for few clients, else a bound (see `others`)."""
    pmfs_VM = vertex_pmfs(event)
    others = few_or_cores(pmfs_VM, places(event), event.clients - 1)
    totals_NVZ = np.stack([convolve(others.sums, pmf_M) for pmf_M in pmfs_VM], axis=1)
    worst_E = np.zeros(epsilons_E.size)
    for above, below in itertools.permutations(range(len(pmfs_VM)), 2):
        found_NE = [_hockey_stick(total_VZ[above], total_VZ[below], epsilons_E) for total_VZ in totals_NVZ]
        worst_E = np.maximum(worst_E, others.worst(np.stack(found_NE)))
    return np.minimum(worst_E, 1.0)


def _hockey_stick(p_Z: Array, q_Z: Array, epsilons_E: Array) -> Array:
    """Return Σ max(P − e^ε Q, 0) for each ε."""
    is_likely = p_Z > 0
    with np.errstate(divide="ignore"):
        losses = np.log(p_Z[is_likely]) - np.log(q_Z[is_likely])
    ranked = np.argsort(losses)
    # Levels of a loss above ε count: those from some rank on.
    tails = [np.append(np.cumsum(each[is_likely][ranked[::-1]])[::-1], 0.0) for each in (p_Z, q_Z)]
    first = np.searchsorted(losses[ranked], epsilons_E, side="right")
    found: Array = tails[0][first] - np.exp(epsilons_E) * tails[1][first]
    return np.maximum(found, 0.0)


def rqm_loss(event: Rqm, interval: float) -> Any:
    """Return the privacy loss distribution of one value, on multiples of `interval`."""
    last = int(np.ceil(max_log_ratio(event) / interval))
    steps = np.unique(np.linspace(0, last, _NUM_POINTS).astype(int))
    return loss_of(steps, rqm_profile(event, steps * interval), interval)


def fixed_size_profile(noise_multiplier: float, fraction: float, epsilons_E: Array) -> Array:
    """Return δ for each ε ≥ 0 of a Gaussian sum over units drawn without replacement, one of which is replaced.

    Balle, Barthe, Gaboardi: Privacy Amplification by Subsampling, 2018, theorem 9: with e^ε' = 1 + γ (e^ε − 1), δ' =
    γ δ.

    Args:
        noise_multiplier: standard deviation over how far replacing one moves the sum.
        fraction: γ, drawn of all.
        epsilons_E: ε.
    """
    from scipy.special import log_ndtr

    # log(1 + (e^ε − 1) / γ), also for ε that e^ε is infinite for.
    inner = epsilons_E + np.log((1 - (1 - fraction) * np.exp(-epsilons_E)) / fraction)
    half = 1 / (2 * noise_multiplier)
    at = inner * noise_multiplier
    delta_E: Array = np.exp(log_ndtr(half - at)) - np.exp(inner + log_ndtr(-half - at))
    return fraction * np.clip(delta_E, 0, 1)


def fixed_size_loss(noise_multiplier: float, fraction: float, interval: float) -> Any:
    """Return the privacy loss distribution of `fixed_size_profile`, on multiples of `interval`."""
    farthest = 1 / (2 * noise_multiplier**2) + _TAIL / noise_multiplier
    last = np.logaddexp(np.log(fraction) + farthest, np.log1p(-fraction)) if fraction < 1 else farthest
    near = min(int(np.ceil(last / interval)), 4000)
    steps = np.unique(np.concatenate([np.arange(near + 1), np.geomspace(near, last / interval + 1, 4000).astype(int)]))
    return loss_of(steps, fixed_size_profile(noise_multiplier, fraction, steps * interval), interval)


def loss_of(steps: Any, deltas_E: Array, interval: float) -> Any:
    """Return the privacy loss distribution of a profile that is the same both ways.

    Args:
        steps: ε ≥ 0 in units of `interval`, whole numbers that ascend from 0.
        deltas_E: δ at each.
        interval: step of the distribution.
    """
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    shrunk = np.exp(-steps[:0:-1] * interval)
    mirrored = 1 - shrunk + shrunk * deltas_E[:0:-1]
    deltas = np.clip(np.concatenate([mirrored, deltas_E]), 0, 1)
    # What rounding has lifted stays lifted: the profile does not rise.
    deltas = np.maximum.accumulate(deltas[::-1])[::-1]
    return PrivacyLossDistribution(
        create_pmf_pessimistic_connect_dots(interval, np.concatenate([-steps[:0:-1], steps]), deltas)
    )
