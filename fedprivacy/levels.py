"""RQM's output: the chance of each level for a value, and the inputs at which any divergence is largest.

Everything is in units of the clip: values lie in ±1, and `reach` = 1 + extension / clip. Legend of shapes:
V vertices, M levels of one client, Z levels of a sum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedprivacy.events import Rqm

Array: TypeAlias = npt.NDArray[np.float64]

_AT_A_LEVEL: Final = 1e-12


def pmf(x: float, event: Rqm) -> Array:
    """Return the chance of each level for a value, in closed form, in O(levels²).

    Args:
        x: the value, in units of the clip; beyond ±1 it is clipped.
        event: the mechanism.
    """
    levels, keep = event.levels, event.keep
    reach = 1 + event.extension / event.clip
    at = (min(max(x, -1.0), 1.0) + reach) / (2 * reach) * (levels - 1)
    below = min(int(at), levels - 2)
    # The next kept level below is `lower`, the next above is `upper`; they are independent.
    lower, upper = np.arange(below + 1), np.arange(below + 1, levels)
    chance_lower = np.where(lower > 0, keep, 1.0) * (1 - keep) ** (below - lower)
    chance_upper = np.where(upper < levels - 1, keep, 1.0) * (1 - keep) ** (upper - below - 1)
    both = chance_lower[:, None] * chance_upper
    rounds_up = (at - lower[:, None]) / (upper - lower[:, None])
    return np.concatenate([(both * (1 - rounds_up)).sum(axis=1), (both * rounds_up).sum(axis=0)])


def level_values(event: Rqm) -> Array:
    """Return the value of each level, in units of the clip."""
    top = event.levels - 1
    return (1 + event.extension / event.clip) * np.arange(-top, top + 1, 2) / top


def vertices(event: Rqm) -> Array:
    """Return ±1 and the levels strictly between, ascending.

    Between two neighbours the pmf is affine in the value. A divergence that is convex in both distributions, such as
    exp((α − 1) D_α) and the hockey-stick divergence, is therefore largest at vertices: of both inputs that are told
    apart, and of every other client's in a sum.
    """
    values = level_values(event)
    return np.concatenate([[-1.0], values[np.abs(values) < 1 - _AT_A_LEVEL], [1.0]])


@lru_cache(maxsize=16)
def vertex_pmfs(event: Rqm) -> Array:
    """Return the pmf at each vertex, V × M."""
    return np.stack([pmf(float(x), event) for x in vertices(event)])


def max_log_ratio(event: Rqm) -> float:
    """Return D_∞ of one client, the guarantee of pure ε-DP: no sum of clients has more."""
    logs_VM = np.log(vertex_pmfs(event))
    return float((logs_VM.max(axis=0) - logs_VM.min(axis=0)).max())


def variance(x: float, event: Rqm) -> float:
    """Return the variance of one decoded value, in the units of `event.clip`."""
    values, chances = level_values(event), pmf(x, event)
    mean = float(chances @ values)
    return float(chances @ (values - mean) ** 2) * event.clip**2
