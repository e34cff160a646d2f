"""The values of largest magnitude."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedcodec.base import Kind, Positions, Selected, Traits
from fedcore.layout import Vector
from fedcore.plugin import Plugin


class TopK(Plugin):
    """Keeps the ⌈fraction · D⌉ values of largest magnitude; of equal ones those that come first.

    What it loses is at most (1 − fraction) ‖x‖²: the kept ones are the largest.
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

    def select(self, values_D: Vector, rng: np.random.Generator) -> Selected:
        """See `Selector.select`; draws nothing."""
        count = self.max_selected(values_D.size)
        # Without its sign bit a float32 is larger exactly where its bits are.
        sizes_D = np.ascontiguousarray(values_D).view(np.uint32) & np.uint32(0x7FFF_FFFF)
        threshold = np.partition(sizes_D, values_D.size - count)[values_D.size - count]
        is_kept_D = sizes_D > threshold
        ties = np.flatnonzero(sizes_D == threshold)[: count - np.count_nonzero(is_kept_D)]
        is_kept_D[ties] = True
        positions_n: Positions = np.flatnonzero(is_kept_D)
        return Selected(positions_n, values_D[positions_n], b"")

    def positions(self, note: bytes, num_values: int) -> Positions:
        """See `Selector.positions`: they are sent."""
        raise NotImplementedError
