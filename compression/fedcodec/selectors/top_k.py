"""The values of largest magnitude."""

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

CHUNK_VALUES: Final = 1 << 16
"""Values looked at once: what is computed on the way stays in a core's cache."""

_MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
"""Without its sign bit a float32 is larger exactly where its bits are."""
_LOWER_BITS: Final = np.uint32(16)
"""Below the exponent and the 7 bits after it."""
_WORTHWHILE: Final = 4
"""If more than one value in so many is to be looked at again, all are sorted at once."""


class TopK(Plugin):
    """Keeps the ⌈fraction · D⌉ values of largest magnitude; of equal ones those that come first.

    A NaN is larger than an infinity, and the more so the larger its payload. What it loses is at most
    (1 − fraction) ‖x‖²: the kept ones are the largest.
    """

    name: ClassVar[str] = "top-k"
    wire_id: ClassVar[int] = 20
    kind: ClassVar[Kind] = "select"
    traits: ClassVar[Traits] = Traits(contraction=True)
    note_bytes: ClassVar[int] = 0

    fraction: Annotated[float, Field(gt=0, le=1, description="Share of the values that is kept.")] = 0.01

    def max_selected(self, num_values: int) -> int:
        """See `Selector.max_selected`."""
        return min(num_values, math.ceil(self.fraction * num_values))

    def select(self, values_D: Vector, rng: Draws) -> Selected:
        """See `Selector.select`; draws nothing."""
        positions_n = largest(np.ascontiguousarray(values_D), self.max_selected(values_D.size))
        return Selected(positions_n, values_D[positions_n], b"")

    def positions(self, note: bytes, num_values: int) -> Positions:
        """See `Selector.positions`: they are sent."""
        raise NotImplementedError


def largest(values_D: Vector, count: int) -> Positions:
    """Return where the values of largest magnitude are, of equal ones the first; 1 ≤ `count` ≤ D."""
    floor = _floor(values_D, count)
    if not floor:
        return _largest(values_D.view(np.uint32) & _MAGNITUDE, count)
    candidates_n = at_least(values_D, floor)
    return candidates_n[_largest(values_D[candidates_n].view(np.uint32) & _MAGNITUDE, count)]


def at_least(values_D: Vector, bits: int) -> Positions:
    """Return where the magnitudes are whose binary32 patterns, without the sign, are not below `bits`."""
    found: list[Positions] = []
    for start in range(0, values_D.size, CHUNK_VALUES):
        sizes = values_D[start : start + CHUNK_VALUES].view(np.uint32) & _MAGNITUDE
        found.append(np.flatnonzero(sizes >= np.uint32(bits)) + start)
    return np.concatenate(found)


def _largest(sizes_D: npt.NDArray[np.uint32], count: int) -> Positions:
    threshold = np.partition(sizes_D, sizes_D.size - count)[sizes_D.size - count]
    is_kept_D = sizes_D > threshold
    ties = np.flatnonzero(sizes_D == threshold)[: count - np.count_nonzero(is_kept_D)]
    is_kept_D[ties] = True
    return np.flatnonzero(is_kept_D)


def _floor(values_D: Vector, count: int) -> int:
    """Return a magnitude's pattern that few values reach, `count` of them at least, or 0 if that is not worth it.

    It is the lowest pattern with the upper bits of the `count`-th largest, which a histogram of the upper bits gives in
    one pass. What is left to sort is what is kept, and what is within one part in 128 of the smallest of these.
    """
    most = values_D.size // _WORTHWHILE
    if values_D.size <= CHUNK_VALUES or count > most:
        return 0
    histogram = np.zeros(1 << (31 - _LOWER_BITS), dtype=np.int64)
    for start in range(0, values_D.size, CHUNK_VALUES):
        sizes = values_D[start : start + CHUNK_VALUES].view(np.uint32) & _MAGNITUDE
        histogram += np.bincount(sizes >> _LOWER_BITS, minlength=histogram.size)
    num_from = histogram[::-1].cumsum()[::-1]
    bucket = int(np.count_nonzero(num_from >= count)) - 1
    return bucket << int(_LOWER_BITS) if num_from[bucket] <= most else 0
