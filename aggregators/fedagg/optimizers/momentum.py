"""FedAvgM: a heavy ball on the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from fedcore.layout import Vector
from fedcore.plugin import Plugin


class Momentum(Plugin):
    """m ← β m + Δ; x ← x + η m.

    Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification, 2019.
    """

    name: ClassVar[str] = "momentum"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    learning_rate: float = Field(default=1.0, gt=0, le=1000, description="η, the server's step size.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="β, how much of the last step is kept.")

    def initial(self, slot: str) -> float:
        """See `ServerOptimizer.initial`."""
        if slot not in self.slots:
            raise ValueError(f"{self.name} has no slot {slot!r}")
        return 0.0

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        """See `ServerOptimizer.step`."""
        momentum_D = slots_D["momentum"]
        momentum_D *= self.momentum
        momentum_D += mean_D
        return self.learning_rate * momentum_D
