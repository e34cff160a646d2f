"""RQM's guarantee for one value: what a client's level, or the sum of several clients' levels, says of one client.

Youn, Hu, Ziani, Abernethy: Randomized Quantization is All You Need for Differential Privacy in Federated Learning,
2023. Neighbours differ in one client's value, which may be anything within the clip before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedprivacy.divergence import worst_divergence
from fedprivacy.events import Rqm
from fedprivacy.levels import Array, max_log_ratio, vertex_pmfs, vertices
from fedprivacy.others import GRID, MAX_CLIENTS, Others, alike, cores, every_arrangement, num_arrangements

_MAX_WORK: Final = 1e9
"""Products that a search over all arrangements may take: seconds."""
_MAX_CORE_WORK: Final = 5e10
MAX_ALIKE: Final = 1000


@dataclass(frozen=True)
class Worst:
    """Rényi divergences of the worst case.

    Attributes:
        orders: α > 1, or infinity.
        bounds: no arrangement has more: what counts.
        found: some arrangement has as much; None for more than `MAX_ALIKE` clients.
        exact: whether every arrangement was tried, so that both are the same up to rounding.
    """

    orders: tuple[float, ...]
    bounds: Array
    found: Array | None
    exact: bool


def places(event: Rqm) -> Array:
    """Return where the vertices lie among the levels, whole numbers being levels."""
    reach = 1 + event.extension / event.clip
    found: Array = (vertices(event) + reach) / (2 * reach) * (event.levels - 1)
    return found


def max_searched(event: Rqm, num_orders: int) -> int:
    """Return how many of the event's clients can be tried in every arrangement."""
    num_vertices = len(vertices(event))
    count = 1
    while count < event.clients:
        length = (count + 1) * (event.levels - 1) + 1
        work = num_arrangements(num_vertices, count) * (length + num_vertices) * num_vertices * num_orders
        if work > _MAX_WORK:
            break
        count += 1
    return count


def worst_case(event: Rqm, orders: Sequence[float]) -> Worst:
    """Return the divergences of one value for each order.

    With few clients all inputs of all clients are tried, at vertices: that is the supremum. With more the bound is the
    smaller of two: that of as many clients as can be tried, and that of `others.cores`.

    Args:
        event: the mechanism; its `dimension` and `l2_clip` do not matter here.
        orders: each above 1; infinity is the pure guarantee of one client, which for a sum is a bound alone.
    """
    finite = [order for order in orders if np.isfinite(order)]
    pmfs_VM, limit = vertex_pmfs(event), max_log_ratio(event)

    def divergences(others: Others) -> Array:
        found = dict(zip(finite, worst_divergence(pmfs_VM, others, finite, limit), strict=True))
        return np.array([found.get(order, limit) for order in orders])

    searched = max_searched(event, len(finite))
    if searched < event.clients:  # what fewer clients give is seldom the smaller bound: not worth as much time
        searched = max_searched(event, 20 * len(finite))
    bounds = divergences(every_arrangement(pmfs_VM, searched - 1))
    if searched == event.clients:
        return Worst(tuple(orders), bounds, bounds, exact=True)
    length = min(event.clients, MAX_CLIENTS) * event.levels
    work = len(pmfs_VM) * (len(pmfs_VM) + 40) * length * len(finite)
    num_steps = min(GRID, max(6, int((_MAX_CORE_WORK / max(work, 1)) ** 0.5)))
    bounds = np.minimum(bounds, divergences(cores(pmfs_VM, places(event), event.clients - 1, num_steps)))
    found = divergences(alike(pmfs_VM, event.clients - 1)) if event.clients <= MAX_ALIKE else None
    return Worst(tuple(orders), bounds, found, exact=False)
