"""The contract of a server optimiser: a pure step with explicit state.

The aggregate of a version's updates stands where a gradient would, with the sign of a step: clients send
what training added, so the optimiser adds too (Reddi et al., Adaptive Federated Optimization, 2021,
algorithm 1).

Shape legend: D values of a block; blocks of one vector are stepped one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

from pydantic import JsonValue

from fedcore.layout import Vector


class ServerOptimizer(Protocol):
    """An optimiser with its parameters; derive from `fedcore.plugin.Plugin` to get `configure` and `params`.

    Immutable, its state is the caller's: float32 vectors called slots, one value for each of the global
    vector's, journaled as a part of the version. All arithmetic is elementwise in float32 with IEEE 754
    rounding, so any division into blocks, and any machine, gives the same bits.

    Attributes:
        name: what a job file calls it.
        slots: the names of its state vectors, always in this order; () for none.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the optimiser with these parameters.

        Raises:
            InvalidInput: a parameter is unknown (the nearest known one is named), missing or out of bounds.
        """
        ...

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter; `configure` takes them back."""
        ...

    def initial(self, slot: str) -> float:
        """Return what a slot is filled with before the first step.

        Raises:
            ValueError: there is no such slot.
        """
        ...

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        """Return what is added to the global vector, as a new vector.

        Args:
            mean_D: the aggregate, finite and of magnitude at most 2^40; not changed.
            slots_D: every slot's values for this block; updated in place.
            version: the number of the version that this step makes: 1 for the first. The same for all its
                blocks.
        """
        ...
