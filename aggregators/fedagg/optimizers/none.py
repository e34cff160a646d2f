"""Plain averaging: the aggregate is the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from fedcore.layout import Vector
from fedcore.plugin import Plugin


class NoOptimizer(Plugin):
    """x ← x + η Δ. With η = 1 and a weighted mean this is FedAvg (McMahan et al., 2017), bit for bit."""

    name: ClassVar[str] = "none"
    slots: ClassVar[tuple[str, ...]] = ()

    learning_rate: float = Field(default=1.0, gt=0, le=1000, description="η, the server's step size.")

    def initial(self, slot: str) -> float:
        """See `ServerOptimizer.initial`."""
        raise ValueError(f"{self.name} has no slot {slot!r}")

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        """See `ServerOptimizer.step`."""
        return self.learning_rate * mean_D
