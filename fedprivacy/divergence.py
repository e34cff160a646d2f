"""Rényi divergence over families of distributions.

D_α(P‖Q) = log(Σ P^α Q^(1−α)) / (α − 1); the sum is called the moment. Where a bound on log(P/Q) keeps the moment
finite in binary64, it is computed by matrix products; for larger orders D_∞ stands in, which is no less.

Legend of shapes: N sums of others, A and B inputs, M levels of one client, Z levels of a sum, K orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from fedprivacy.levels import Array
from fedprivacy.others import Others, convolve

MAX_LOG: Final = 600.0
"""Largest (α − 1) D_∞ that is computed: its exponential is finite with room for sums."""
TINY: Final = 1e-280
"""Levels less likely than this are left out; they add less than e^(MAX_LOG + D_∞) TINY to a moment."""
_CHUNK: Final = 1 << 17

CURVE_ORDERS: Final = (1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 20, 26, 32, 48, 64)


def worst_divergence(pmfs_AM: Array, others: Others, orders: Sequence[float], max_log_ratio: float) -> Array:
    """Return for each order the largest divergence between two of the inputs, whatever the others add.

    Args:
        pmfs_AM: one client's distribution for each of its inputs.
        others: what is added to it.
        orders: above 1.
        max_log_ratio: a bound on |log(P/Q)|, such as D_∞ of one client.
    """
    computed = [order for order in orders if (order - 1) * max_log_ratio <= MAX_LOG]
    moments: dict[float, list[Array]] = {order: [] for order in computed}
    for likeliest_N1Z, logs_NAZ in log_families(pmfs_AM, others.sums):
        for order, of_order in moments.items():
            above = np.exp(order * logs_NAZ) * likeliest_N1Z
            below = np.exp((1 - order) * logs_NAZ)
            of_order.append((above @ below.swapaxes(1, 2)).reshape(len(above), -1))
    found = dict.fromkeys(orders, max_log_ratio)
    for order, of_order in moments.items():
        worst = float(others.worst(np.concatenate(of_order)).max())
        found[order] = min(max(np.log(worst), 0.0) / (order - 1), max_log_ratio)
    return np.array([found[order] for order in orders])


def log_families(pmfs_AM: Array, sums_NZ: Array) -> Iterator[tuple[Array, Array]]:
    """Yield, for some sums at a time, the largest chance of each level, and the log of each input's chance over it."""
    inputs, levels = pmfs_AM.shape
    step = max(1, _CHUNK // (inputs * (sums_NZ.shape[1] + levels - 1)))
    for start in range(0, len(sums_NZ), step):
        total_NAZ = np.stack([convolve(sums_NZ[start : start + step], pmf_M) for pmf_M in pmfs_AM], axis=1)
        likeliest_N1Z = total_NAZ.max(axis=1, keepdims=True)
        is_kept = total_NAZ.min(axis=1, keepdims=True) > TINY
        with np.errstate(divide="ignore", invalid="ignore"):
            logs_NAZ = np.where(is_kept, np.log(total_NAZ / likeliest_N1Z), 0.0)
        yield np.where(is_kept, likeliest_N1Z, 0.0), logs_NAZ


def upper_curve(orders: Sequence[float], divergences: Array, limit: float, wanted: Sequence[float]) -> Array:
    """Return a bound at each wanted order, from divergences at some.

    (α − 1) D_α is convex in α and 0 at 1, so that a straight line between two orders is no less than it. Beyond the
    last order `limit` holds, a bound on D_∞.
    """
    at = np.concatenate([[1.0], orders])
    scaled = np.concatenate([[0.0], (np.asarray(orders) - 1) * divergences])
    alphas = np.asarray(wanted, dtype=np.float64)
    line = np.interp(alphas, at, scaled) / (alphas - 1)
    return np.where(alphas <= at[-1], np.minimum(line, limit), limit)
