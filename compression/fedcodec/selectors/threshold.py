"""The values from a magnitude on."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedcodec.base import Kind, Positions, Selected, Traits
from fedcodec.selectors.top_k import at_least
from fedcore.draws import Draws
from fedcore.layout import Vector
from fedcore.plugin import Plugin


class Threshold(Plugin):
    """Keeps x where |x| ≥ `value`, and every NaN: none of the values, all of them, or what lies between.

    Nothing may be left of small values, so it is no contraction, and a frame may hold all of the values.
    """

    name: ClassVar[str] = "threshold"
    wire_id: ClassVar[int] = 21
    kind: ClassVar[Kind] = "select"
    traits: ClassVar[Traits] = Traits()
    note_bytes: ClassVar[int] = 0

    value: Annotated[
        float, Field(gt=0, le=float(np.finfo(np.float32).max), description="Smallest magnitude that is kept.")
    ] = 1e-3

    def max_selected(self, num_values: int) -> int:
        """See `Selector.max_selected`."""
        return num_values

    def select(self, values_D: Vector, rng: Draws) -> Selected:
        """See `Selector.select`; draws nothing."""
        positions_n = at_least(np.ascontiguousarray(values_D), self._bits())
        return Selected(positions_n, values_D[positions_n], b"")

    def positions(self, note: bytes, num_values: int) -> Positions:
        """See `Selector.positions`: they are sent."""
        raise NotImplementedError

    def _bits(self) -> int:
        """Return the pattern of the smallest float32 that is not below `value`."""
        with np.errstate(under="ignore"):
            nearest = np.float32(self.value)
        return int(nearest.view(np.uint32)) + (float(nearest) < self.value)
