"""FedAdam: steps shrink with a moving average of squared aggregates."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedagg.optimizers.adaptive import Adaptive
from fedcore.layout import Vector


class Adam(Adaptive):
    """v ← β₂ v + (1 − β₂) Δ²; the rest is in `Adaptive`."""

    name: ClassVar[str] = "adam"

    beta2: float = Field(default=0.99, ge=0, lt=1, description="β₂, how much of v is kept.")

    def _update_v(self, v_D: Vector, squared_D: Vector) -> None:
        v_D *= self.beta2
        v_D += (1 - self.beta2) * squared_D
