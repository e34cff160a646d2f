"""Epsilon of a history: by Rényi divergences (RDP) and by privacy loss distributions (PLD).

dp-accounting does the accounting of Gaussian sums, and the composition; what RQM and PBM cost is computed here.
Both epsilons are upper bounds; PLD's is the smaller one as a rule, and is not known for all mechanisms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Final

import numpy as np

from fedcore.errors import ConfigError, InvalidInput
from fedprivacy import pbm
from fedprivacy.events import Adjacency, ClipCount, Everyone, FixedSize, Gaussian, History, Pbm, Poisson, Release, Rqm
from fedprivacy.guarantee import Guarantee, not_covered, sampling_texts
from fedprivacy.levels import Array
from fedprivacy.profiles import fixed_size_loss, rqm_loss
from fedprivacy.vectors import vector_divergence

ACCOUNTING_MISSING: Final = "no accounting: dp-accounting is not installed (pip install 'roundtable[privacy]')"
INTERVAL: Final = 1e-4
"""Step of privacy loss distributions, unless epsilon is above 10: then it grows with epsilon."""
_MAX_INTERVAL: Final = 0.05
_MAX_RELEASES: Final = 10**6
_MAX_SAMPLED: Final = 10**7
"""Beyond this, composing with itself what is sampled takes minutes."""


def epsilon_rdp(history: History, delta: float) -> float:
    """Return epsilon by Rényi divergences; infinity if no order gives one.

    Raises:
        InvalidInput: `delta` is not between 0 and 1.
        ConfigError: dp-accounting is not installed.
    """
    check_delta(delta)
    _check_installed()
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    orders = np.array(rdp.DEFAULT_RDP_ORDERS, dtype=np.float64)
    return float(rdp.compute_epsilon(orders, rdp_curve(history, orders), delta)[0])


def epsilon_pld(history: History, delta: float) -> float | None:
    """Return epsilon by privacy loss distributions; None if that is not known.

    It is not for vectors accounted for by their ℓ2 norm, for PBM, and for so many values that no grid holds their
    losses.

    Raises:
        InvalidInput: `delta` is not between 0 and 1.
        ConfigError: dp-accounting is not installed.
    """
    # In powers of two, so that losses of single steps are found again.
    finer_than = max(1.0, epsilon_rdp(history, delta) / 1e5 / INTERVAL)
    interval = INTERVAL * 2.0 ** math.ceil(math.log2(finer_than)) if math.isfinite(finer_than) else math.inf
    if interval > _MAX_INTERVAL or not all(map(_has_loss, history.releases)):
        return None
    from dp_accounting.pld.privacy_loss_distribution import identity

    loss = identity(value_discretization_interval=interval)
    for release in history.releases:
        for part in _losses(release, history.adjacency, interval):
            loss = loss.compose(part)
    return float(loss.get_epsilon_for_delta(delta))


def guarantee(history: History, delta: float, *, with_pld: bool = True) -> Guarantee:
    """Return what these releases guarantee: epsilon by PLD where that is known and smaller, else by RDP.

    Without `with_pld` by RDP alone, which takes milliseconds instead of a second.

    Raises:
        InvalidInput: `delta` is not between 0 and 1.
        ConfigError: dp-accounting is not installed.
    """
    by_rdp, by_pld = epsilon_rdp(history, delta), epsilon_pld(history, delta) if with_pld else None
    is_pld = by_pld is not None and by_pld <= by_rdp
    name = "privacy loss distributions (PLD)" if is_pld else "Rényi divergences (RDP)"
    return Guarantee(
        epsilon=by_rdp if by_pld is None else min(by_pld, by_rdp),
        delta=delta,
        unit=history.unit,
        adjacency=history.adjacency,
        trust=history.trust,
        sampling=sampling_texts(history),
        accountant=f"{name}, dp-accounting {version('dp-accounting')}",
        epsilon_pld=by_pld,
        epsilon_rdp=by_rdp,
        not_covered=not_covered(history),
    )


def check_delta(delta: float) -> None:
    """Raise InvalidInput unless `delta` is above 0 and below 1."""
    if not 0 < delta < 1:
        raise InvalidInput(f"delta {delta}: above 0 and below 1 is needed; less than 1 in the number of units is usual")


def rdp_curve(history: History, orders: Array) -> Array:
    """Return the Rényi divergence of the whole history at each order: it adds up.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    _check_installed()
    total = np.zeros(len(orders))
    for release in history.releases:
        total += release.count * np.array(_release_curve(release, history.adjacency, tuple(orders.tolist())))
    return total


@lru_cache(maxsize=4096)
def _release_curve(release: Release, adjacency: Adjacency, orders: tuple[float, ...]) -> tuple[float, ...]:
    total = np.zeros(len(orders))
    for mechanism in release.mechanisms:
        match mechanism:
            case Rqm():
                total += vector_divergence(mechanism, adjacency, orders)
            case Pbm():
                total += mechanism.dimension * pbm.worst_divergence(mechanism, orders)
    if (multiplier := _noise_over_sensitivity(release, adjacency)) is not None:
        total += _gaussian_curve(release, multiplier, orders)
    return tuple(total.tolist())


def _gaussian_curve(release: Release, multiplier: float, orders: Sequence[float]) -> Array:
    """Return dp-accounting's curve of one Gaussian release.

    Its RDP takes the multiplier over the sensitivity under the relation in question, and so do we: its PLD takes that
    of adding one whatever the relation, which is why neither is given an adjacency of ours.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    event: Any = dp.GaussianDpEvent(multiplier)
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    match release.sampling:
        case Poisson(rate=rate):
            event = dp.PoissonSampledDpEvent(rate, event)
        case FixedSize(size=size, population=population):
            event = dp.SampledWithoutReplacementDpEvent(population, size, event)
            relation = dp.NeighboringRelation.REPLACE_ONE
    with _orders_left_out_in_silence():
        found: Array = RdpAccountant(orders, relation).compose(event).rdp
    return found


@contextmanager
def _orders_left_out_in_silence() -> Iterator[None]:
    """Keep one warning of dp-accounting off standard error: of an order at which a series of its does not converge.

    The divergence there is taken for infinite, so that the order is left out: epsilon can only be larger. All else
    that is logged, there and meanwhile, passes.
    """

    def is_something_else(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("_compute_log_a_frac failed to converge")

    # The logger is absl's own kind, which is there once dp-accounting is imported.
    logger = logging.getLogger("absl")
    logger.addFilter(is_something_else)
    try:
        yield
    finally:
        logger.removeFilter(is_something_else)


def _noise_over_sensitivity(release: Release, adjacency: Adjacency) -> float | None:
    """Return the noise multiplier of all Gaussian sums of a release together; None if there are none.

    They are of the same units, drawn once, so that they are one Gaussian sum of longer vectors. Replacing a unit
    moves a sum by two clips, twice as far as adding one or making it zero; the count of ±1/2 by one instead of a
    half.
    """
    multipliers = [each.noise_multiplier for each in release.mechanisms if isinstance(each, Gaussian)]
    multipliers += [2 * each.std for each in release.mechanisms if isinstance(each, ClipCount)]
    if not multipliers:
        return None
    together: float = math.fsum(each**-2 for each in multipliers) ** -0.5
    return together / 2 if adjacency is Adjacency.REPLACE else together


def _has_loss(release: Release) -> bool:
    if not isinstance(release.sampling, Everyone) and release.count > _MAX_SAMPLED:
        return False
    values = sum(each.dimension for each in release.mechanisms if isinstance(each, Rqm))
    return release.count * values <= _MAX_RELEASES and not any(
        isinstance(each, Pbm) or (isinstance(each, Rqm) and each.l2_clip is not None) for each in release.mechanisms
    )


@lru_cache(maxsize=16)  # of some MiB each, and most of what an epsilon takes
def _gaussian_loss(multiplier: float, rate: float, interval: float) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(multiplier, sampling_prob=rate, value_discretization_interval=interval)


def _losses(release: Release, adjacency: Adjacency, interval: float) -> list[Any]:
    """Return privacy loss distributions which together are that of a release, as often as it was made."""
    found = [
        rqm_loss(each.model_copy(update={"dimension": 1}), interval).self_compose(each.dimension * release.count)
        for each in release.mechanisms
        if isinstance(each, Rqm)
    ]
    if (multiplier := _noise_over_sensitivity(release, adjacency)) is None:
        return found
    match release.sampling:
        case Everyone():
            found.append(_gaussian_loss(multiplier / math.sqrt(release.count), 1.0, interval))
        case Poisson(rate=rate):
            found.append(_gaussian_loss(multiplier, rate, interval).self_compose(release.count))
        case FixedSize(size=size, population=population):
            once = fixed_size_loss(multiplier, size / population, interval)
            found.append(once.self_compose(release.count))
    return found


def is_installed() -> bool:
    """Whether epsilons can be computed here."""
    return find_spec("dp_accounting") is not None


def _check_installed() -> None:
    if not is_installed():
        raise ConfigError(ACCOUNTING_MISSING)
