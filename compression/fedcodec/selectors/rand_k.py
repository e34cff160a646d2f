"""Values at positions that a seed tells."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedcodec.base import Kind, Positions, Selected, Traits
from fedcore.draws import Draws
from fedcore.layout import Vector
from fedcore.plugin import Plugin

CHUNK_VALUES: Final = 1 << 14
"""Positions hashed at once: what is computed on the way stays in a core's cache."""

_WORD: Final = (1 << 64) - 1


class RandK(Plugin):
    """Keeps k = ⌈fraction · D⌉ values at random positions, times D / k: right on average, whatever the values.

    Konečný et al.: Federated Learning: Strategies for Improving Communication Efficiency, 2016, with positions that
    follow from a seed of 8 bytes, which anyone who reads the frame knows. Products are rounded to float32, and
    above its range they are infinite.
    """

    name: ClassVar[str] = "rand-k"
    wire_id: ClassVar[int] = 22
    kind: ClassVar[Kind] = "select"
    traits: ClassVar[Traits] = Traits(unbiased=True, changes_sensitivity=True)
    note_bytes: ClassVar[int] = 8

    fraction: Annotated[float, Field(gt=0, le=1, description="Share of the values that is kept.")] = 0.1

    def max_selected(self, num_values: int) -> int:
        """See `Selector.max_selected`; never fewer."""
        return min(num_values, math.ceil(self.fraction * num_values))

    def select(self, values_D: Vector, rng: Draws) -> Selected:
        """See `Selector.select`; draws the seed."""
        note = rng.bytes(8)
        positions_n = self.positions(note, values_D.size)
        scale = np.float64(values_D.size / positions_n.size)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values_n = (values_D[positions_n] * scale).astype(np.float32)
        return Selected(positions_n, values_n, note)

    def positions(self, note: bytes, num_values: int) -> Positions:
        """See `Selector.positions`."""
        return smallest_hashes(int.from_bytes(note, "little"), self.max_selected(num_values), num_values)


def smallest_hashes(seed: int, count: int, size: int) -> Positions:
    """Return the `count` positions below `size` for which splitmix64(seed + position) is smallest, ascending.

    No two hashes are equal. Only those are gathered that are below a bound, which is too low for about one seed in
    50 and then is doubled.
    """
    bound = min(_WORD, (count + 2 * math.isqrt(count) + 4 << 64) // size)
    while True:
        positions, hashes = _below(seed, bound, size)
        if positions.size >= count:
            # It is a permutation of the words, so there are no ties.
            kept: Positions = positions[hashes <= np.partition(hashes, count - 1)[count - 1]]
            return kept
        bound = min(_WORD, 2 * bound)


def splitmix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return what the generator gives first that was seeded with each word.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014, with the constants of Vigna's
    splitmix64.c.
    """
    mixed = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58_476D_1CE4_E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D0_49BB_1331_11EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _below(seed: int, bound: int, size: int) -> tuple[Positions, npt.NDArray[np.uint64]]:
    positions, hashes = [], []
    for start in range(0, size, CHUNK_VALUES):
        words = np.arange(min(CHUNK_VALUES, size - start), dtype=np.uint64) + np.uint64((seed + start) & _WORD)
        found = splitmix64(words)
        inside = np.flatnonzero(found <= np.uint64(bound))
        positions.append(inside + start)
        hashes.append(found[inside])
    return np.concatenate(positions), np.concatenate(hashes)
