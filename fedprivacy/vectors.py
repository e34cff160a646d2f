"""RQM's guarantee for a whole vector: by its dimension, and by how far it can move in ℓ2.

The values of a vector are drawn independently, so that Rényi divergences add up: d values cost at most d times the
worst value. If the vectors of neighbours differ by at most r in ℓ2, they also cost at most K_α r², whatever d is,
with K_α no less than D_α(x, x') / (x − x')² for any two values. docs/privacy.md has the proof; K_α is computed here,
from above.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from fedprivacy.divergence import CURVE_ORDERS, MAX_LOG, TINY, upper_curve
from fedprivacy.events import Adjacency, Rqm
from fedprivacy.levels import Array, max_log_ratio, vertex_pmfs, vertices
from fedprivacy.others import Others, convolve, few_or_cores
from fedprivacy.rqm import places, worst_case

NEAR: Final = 1e-4
"""Values nearer than this to a vertex, in clips, are bounded by the second derivative."""
_RATIO: Final = 1.2
"""Between the distances from a vertex at which moments are computed."""
_HUGE: Final = 1e300
"""Instead of infinity, which has no product with zero."""
_CHUNK: Final = 1 << 16
_STEPS: Final = 64
"""Into which a chord is cut."""


@lru_cache(maxsize=64)
def vector_curve(event: Rqm, adjacency: Adjacency) -> Array:
    """Return the Rényi divergence of one vector, at each of `CURVE_ORDERS`.

    With `Adjacency.REPLACE` a client's vector may be anything before and after; with `Adjacency.ZERO_OUT` it is zero
    on one side, which is nearer.
    """
    scalar = event.model_copy(update={"dimension": 1, "l2_clip": None})
    by_dimension = event.dimension * worst_case(scalar, CURVE_ORDERS).bounds
    if event.l2_clip is None:
        return by_dimension
    radius = event.l2_clip / event.clip * (1 if adjacency is Adjacency.ZERO_OUT else 2)
    return np.minimum(by_dimension, radius**2 * steepness(scalar))


def vector_divergence(event: Rqm, adjacency: Adjacency, orders: Sequence[float]) -> Array:
    """Return a bound on the Rényi divergence of one vector, at any orders above 1."""
    limit = event.dimension * max_log_ratio(event)
    return upper_curve(CURVE_ORDERS, vector_curve(event, adjacency), limit, orders)


@lru_cache(maxsize=16)
def steepness(event: Rqm) -> Array:
    """Return K_α at each of `CURVE_ORDERS`: D_α ≤ K_α (x − x')², in clips, whatever the others add.

    It is infinite at orders whose moments may overflow.
    """
    pmfs_VM = vertex_pmfs(event)
    others = few_or_cores(pmfs_VM, places(event), event.clients - 1)
    totals_NVZ = np.stack([convolve(others.sums, pmf_M) for pmf_M in pmfs_VM], axis=1)
    worst = np.zeros(len(CURVE_ORDERS))
    for vertex, side in itertools.product(range(len(pmfs_VM)), (-1, 1)):
        if 0 <= vertex + side < len(pmfs_VM):
            away = slice(vertex, None, side)
            ends_V = np.abs(vertices(event)[away] - vertices(event)[vertex])
            found = _steepness_from(ends_V, totals_NVZ[:, away], others, max_log_ratio(event))
            worst = np.maximum(worst, found)
    return np.where((np.array(CURVE_ORDERS) - 1) * max_log_ratio(event) <= MAX_LOG, worst, np.inf)


def _steepness_from(ends_V: Array, totals_NVZ: Array, others: Others, limit: float) -> Array:
    """Return the same, of one value at a vertex and the other anywhere on one side of it.

    Args:
        ends_V: distances to the vertices on that side, the first one 0.
        totals_NVZ: the distributions there.
        others: what the others add.
        limit: D_∞.
    """
    num_steps = int(np.log(max(ends_V[-1] / NEAR, 1.0)) / np.log(_RATIO)) + 1
    grid = NEAR * _RATIO ** np.arange(num_steps)
    distances_X = np.unique(np.concatenate([grid[grid < ends_V[-1]], ends_V[ends_V > NEAR], ends_V[-1:]]))
    between_XV = np.stack([np.interp(distances_X, ends_V, column) for column in np.eye(ends_V.size)], axis=1)
    end_V = np.array([[np.interp(NEAR, ends_V, column) for column in np.eye(ends_V.size)]])
    step = max(1, _CHUNK // (distances_X.size * totals_NVZ.shape[-1]))
    near, far = [], []
    for start in range(0, len(totals_NVZ), step):
        every_NVZ = totals_NVZ[start : start + step]
        is_kept = every_NVZ.min(axis=1, keepdims=True) > TINY
        # Levels left out are as if nobody's input moved them.
        some_NVZ = np.where(is_kept, every_NVZ, 1.0)
        slopes_NCZ = np.diff(some_NVZ, axis=1) / np.diff(ends_V)[:, None]
        weights_NZ = np.where(is_kept[:, 0], 1.0, 0.0)
        passed_NVZ = np.concatenate([some_NVZ[:, ends_V < NEAR], end_V @ some_NVZ], axis=1)
        near.append(_near(passed_NVZ, slopes_NCZ[:, ends_V[:-1] < NEAR]))
        far.append(_moments(some_NVZ[:, 0], between_XV @ some_NVZ, weights_NZ, limit))
    # A chord joins two moments of one arrangement.
    moments_N = np.concatenate(far)
    moments_C = moments_N if others.weights is None else np.tensordot(others.weights, moments_N, axes=1)
    along = _along_chords(distances_X, moments_C).max(axis=0)
    found: Array = np.maximum(others.worst(np.concatenate(near)), along) / (np.array(CURVE_ORDERS) - 1)
    return found


def _near(passed_NVZ: Array, slopes_NCZ: Array) -> Array:
    """Return, N × orders, a bound on (moment − 1) / distance² up to `NEAR`, whichever of the two has moved.

    It is half the second derivative along the way from one distribution to the other, each level taken where that is
    largest.

    Args:
        passed_NVZ: the distributions at the vertex, at those passed, and at `NEAR`: no chance between is more extreme.
        slopes_NCZ: of the cells on the way.
    """
    base_NZ = passed_NVZ[:, 0]
    steepest_NZ = (slopes_NCZ**2).max(axis=1) / base_NZ
    grown_NZ, shrunk_NZ = passed_NVZ.max(axis=1) / base_NZ, passed_NVZ.min(axis=1) / base_NZ
    found = []
    for order in CURVE_ORDERS:
        above = (grown_NZ if order >= 2 else shrunk_NZ) ** (order - 2)
        with np.errstate(over="ignore"):
            below = shrunk_NZ ** (-order - 1)
            worst_N = np.maximum((steepest_NZ * above).sum(axis=1), (steepest_NZ * below).sum(axis=1))
        found.append(order * (order - 1) / 2 * np.minimum(worst_N, _HUGE))
    return np.stack(found, axis=1)


def _moments(base_NZ: Array, moved_NXZ: Array, weights_NZ: Array, limit: float) -> Array:
    """Return the moments of moved against base and the reverse, N × 2 × X × orders; 1 where they may overflow."""
    logs_NXZ = np.log(moved_NXZ / base_NZ[:, None])
    base_NZ, moved_NXZ = base_NZ * weights_NZ, moved_NXZ * weights_NZ[:, None]
    found = np.ones((len(base_NZ), 2, moved_NXZ.shape[1], len(CURVE_ORDERS)))
    for index, order in enumerate(CURVE_ORDERS):
        if (order - 1) * limit <= MAX_LOG:
            ratios_NXZ = np.exp((order - 1) * logs_NXZ)
            found[:, 0, :, index] = np.einsum("nxz,nxz->nx", moved_NXZ, ratios_NXZ)
            found[:, 1, :, index] = np.einsum("nz,nxz->nx", base_NZ, 1 / ratios_NXZ)
    return found


def _along_chords(distances_X: Array, moments_C2XK: Array) -> Array:
    """Return the largest log(moment) / distance² between neighbouring distances, for each C and order.

    Within a cell moments are convex, so a chord is no less; along it, steps are small.
    """
    start, end = moments_C2XK[:, :, :-1], moments_C2XK[:, :, 1:]
    first, last = distances_X[:-1, None], distances_X[1:, None]
    worst = np.zeros((len(moments_C2XK), moments_C2XK.shape[-1]))
    for step in range(_STEPS):
        chord = start + (end - start) * ((step + 1) / _STEPS)
        # No moment on a step is larger than at its end or the chord's start; no distance smaller than at its start.
        largest = np.log(np.maximum(np.maximum(chord, start), 1.0))
        found = largest / (first + (last - first) * (step / _STEPS)) ** 2
        worst = np.maximum(worst, found.max(axis=(1, 2), initial=0.0))
    return worst
