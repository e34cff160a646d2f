"""The Poisson binomial mechanism, to compare RQM with.

Chen, Özgür, Kairouz: The Poisson Binomial Mechanism for Unbiased Federated Learning with Secure Aggregation, 2022.

A value decides the chance of all of a client's coins alike. Were each coin free, in both data sets, the worst case
could only be worse; and moments are convex in each coin's pair of chances, so that every coin is at 1/2 ± theta. Then
both sums are of k and of l likely coins among all n · trials, with |k − l| at most `trials`: these are searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedprivacy.divergence import MAX_LOG, TINY
from fedprivacy.events import Pbm
from fedprivacy.levels import Array
from fedprivacy.others import binomial

MAX_COINS: Final = 1024
"""More clients than have these are taken for fewer: leaving coins out makes no divergence smaller."""


def max_log_ratio(event: Pbm) -> float:
    """Return D_∞ of one client's sum: that of all its coins."""
    return event.trials * math.log((0.5 + event.theta) / (0.5 - event.theta))


def worst_divergence(event: Pbm, orders: Sequence[float]) -> Array:
    """Return a bound on the Rényi divergence of one value in the sum, for each order above 1, or infinity."""
    limit = max_log_ratio(event)
    worst = dict.fromkeys([order for order in orders if order != math.inf and (order - 1) * limit <= MAX_LOG], 0.0)
    coins = event.trials * min(event.clients, max(1, MAX_COINS // event.trials))
    sums_KZ = _sums(coins, 0.5 + event.theta)
    for apart in range(1, event.trials + 1):
        for above, below in ((sums_KZ[apart:], sums_KZ[:-apart]), (sums_KZ[:-apart], sums_KZ[apart:])):
            is_kept = (above > TINY) & (below > TINY)
            logs = np.log(np.where(is_kept, above, 1.0) / np.where(is_kept, below, 1.0))
            for order in worst:
                moments = (np.exp((order - 1) * logs) * np.where(is_kept, above, 0.0)).sum(axis=1)
                worst[order] = max(worst[order], float(np.log(moments.max())) / (order - 1))
    return np.array([min(worst.get(order, limit), limit) for order in orders])


def variance(event: Pbm) -> float:
    """Return the variance of one decoded value at 0, in clips."""
    return 1 / (4 * event.trials * event.theta**2)


def _sums(coins: int, likely: float) -> Array:
    """Return the distribution of the sum of `coins` coins of which the first k are likely, for each k."""
    return np.stack([np.convolve(binomial(k, likely), binomial(coins - k, 1 - likely)) for k in range(coins + 1)])
