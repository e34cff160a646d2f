"""What the other clients add to a sum that an adversary has arranged: all they can do, or no less than they must.

An adversary chooses the inputs of all clients. Up to a number of arrangements each is tried. Beyond it a bound holds
for all of them: whatever the vertex on one side of zero, with probability w a client adds the same noise, its *core*,
up to a known shift. Telling the adversary who added a core and who did not, and leaving out what the latter added,
makes no divergence smaller: that is joint convexity, and data processing. What is left depends on how many added
which core.

Legend of shapes: V vertices, M levels of one client, Z levels of a sum, N sums of others, C arrangements of them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedprivacy.levels import Array

MAX_CLIENTS: Final = 256
"""More than these are taken for these: leaving noise out makes no divergence smaller."""
GRID: Final = 40
"""How many numbers of cores on a side are told apart; the others go down to the next one."""


_MAX_FEW: Final = 1000
_FEW_STEPS: Final = 12
_MAX_SIZE: Final = 50_000


@dataclass(frozen=True)
class Others:
    """Sums that others may add.

    Attributes:
        sums: N × Z, the distribution of each sum; shifts do not matter.
        weights: C × N, for each arrangement the chance of each sum, known to the adversary when it comes; None if each
            sum is an arrangement by itself.
    """

    sums: Array
    weights: Array | None

    def worst(self, values_NK: Array) -> Array:
        """Return the largest over arrangements of the expected value, for each of K."""
        values_CK = values_NK if self.weights is None else self.weights @ values_NK
        found: Array = values_CK.max(axis=0)
        return found


def num_arrangements(num_vertices: int, num_others: int) -> int:
    """Return in how many ways the others can be put on vertices."""
    return math.comb(num_others + num_vertices - 1, num_others)


def every_arrangement(pmfs_VM: Array, num_others: int) -> Others:
    """Return the sum of every arrangement of the others on vertices that lie symmetrically around zero.

    Of an arrangement and its mirror image one is enough: so is what they add, and the inputs that it is added to.
    """
    sums = [np.ones((1, 1))] + [np.empty((0, 1))] * (len(pmfs_VM) - 1)  # by the last vertex that was used
    steps = [np.zeros(len(rows)) for rows in sums]  # how far from the leftmost vertex, all together
    for _ in range(num_others):
        sums = [convolve(np.concatenate(sums[: vertex + 1]), pmf_M) for vertex, pmf_M in enumerate(pmfs_VM)]
        steps = [np.concatenate(steps[: vertex + 1]) + vertex for vertex in range(len(pmfs_VM))]
    is_left = np.concatenate(steps) <= num_others * (len(pmfs_VM) - 1) / 2
    return Others(np.concatenate(sums)[is_left], None)


def few_or_cores(pmfs_VM: Array, places_V: Array, num_others: int) -> Others:
    """Return every arrangement if they are few, else a few numbers of cores: for what takes long with each."""
    if num_arrangements(len(pmfs_VM), num_others) <= _MAX_FEW:
        return every_arrangement(pmfs_VM, num_others)
    counted = max(1, _MAX_SIZE // pmfs_VM.size)
    return cores(pmfs_VM, places_V, min(num_others, counted), _FEW_STEPS)


def alike(pmfs_VM: Array, num_others: int) -> Others:
    """Return the sums of others that all have one input: some of the arrangements."""
    return Others(np.stack([power(pmf_M, num_others) for pmf_M in pmfs_VM]), None)


def cores(pmfs_VM: Array, places_V: Array, num_others: int, num_steps: int = GRID) -> Others:
    """Return no less noise than any arrangement of the others adds.

    Args:
        pmfs_VM: of vertices that lie symmetrically around zero.
        places_V: where they lie among the levels: whole numbers are levels.
        num_others: at most `MAX_CLIENTS` − 1 are counted.
        num_steps: see `GRID`; fewer are faster and give a looser bound.
    """
    count = min(num_others, MAX_CLIENTS - 1)
    num_left = (len(pmfs_VM) + 1) // 2  # a vertex at zero is on both sides
    core, chance = _core(pmfs_VM[:num_left], places_V[:num_left])
    grid = sorted({round(step) for step in np.linspace(0, count, num_steps)} | {0, count})
    powers = [power(core, each) for each in grid]
    pairs = [(i, j) for i, j in itertools.product(range(len(grid)), repeat=2) if grid[i] + grid[j] <= count]
    length = count * (core.size - 1) + 1
    sums_NZ = np.zeros((len(pairs), length))
    for row, (i, j) in zip(sums_NZ, pairs, strict=True):
        total = np.convolve(powers[i], powers[j][::-1])  # on the right everything is mirrored
        row[: total.size] = total
    # Less noise than was drawn is a bound too: numbers of cores go down to the grid.
    down_KG = np.stack([_rounded_down(binomial(k, chance), grid) for k in range(count + 1)])
    weights_CN = np.stack([[down_KG[k, i] * down_KG[count - k, j] for i, j in pairs] for k in range(count + 1)])
    # The pairs left out have more cores than there are others on a side: rounding down never reaches them.
    return Others(sums_NZ, weights_CN)


def convolve(rows_NZ: Array, pmf_M: Array) -> Array:
    """Return the distribution of each sum and one client more: without FFT, which is wrong in the tails."""
    out = np.zeros((rows_NZ.shape[0], rows_NZ.shape[1] + pmf_M.size - 1))
    for level, chance in enumerate(pmf_M):
        out[:, level : level + rows_NZ.shape[1]] += chance * rows_NZ
    return out


def power(pmf_M: Array, times: int) -> Array:
    """Return the distribution of a sum of `times` independent draws."""
    total, square = np.ones(1), pmf_M
    while times:
        if times & 1:
            total = np.convolve(total, square)
        times >>= 1
        if times:
            square = np.convolve(square, square)
    return total


def binomial(count: int, chance: float) -> Array:
    """Return the chance of each number of successes."""
    k = np.arange(count + 1)
    if chance >= 1:
        return np.where(k == count, 1.0, 0.0)
    logs = np.cumsum(np.concatenate([[0.0], np.log((count - k[:-1]) / (k[:-1] + 1))]))
    found: Array = np.exp(logs + k * math.log(chance) + (count - k) * math.log1p(-chance))
    return found


def _core(pmfs_VM: Array, places_V: Array) -> tuple[Array, float]:
    """Return what all have in common up to whole shifts, as a pmf, and how much of each it is."""
    best = np.zeros(1)
    for shifts in itertools.product(*({math.floor(at + 1e-9), math.ceil(at - 1e-9)} for at in places_V.tolist())):
        width = pmfs_VM.shape[1] + max(shifts) - min(shifts)
        moved = np.zeros((len(pmfs_VM), width))
        for row, pmf_M, shift in zip(moved, pmfs_VM, shifts, strict=True):
            row[max(shifts) - shift :][: pmf_M.size] = pmf_M
        if (common := moved.min(axis=0)).sum() > best.sum():
            best = common
    chance = float(best.sum())
    core: Array = np.trim_zeros(best) / chance
    return core, chance


def _rounded_down(chances: Array, grid: list[int]) -> Array:
    """Return the chance of each number of the grid, when numbers go down to the next on it."""
    found = np.zeros(len(grid))
    np.add.at(found, np.searchsorted(grid, np.arange(chances.size), side="right") - 1, chances)
    return found
