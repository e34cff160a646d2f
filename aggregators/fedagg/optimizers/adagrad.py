"""FedAdagrad: steps shrink with the sum of all squared aggregates."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedagg.optimizers.adaptive import Adaptive
from fedcore.layout import Vector


class Adagrad(Adaptive):
    """v ← v + Δ²; the rest is in `Adaptive`."""

    name: ClassVar[str] = "adagrad"

    beta1: float = Field(default=0.0, ge=0, lt=1, description="β₁, how much of m is kept.")

    def _update_v(self, v_D: Vector, squared_D: Vector) -> None:
        v_D += squared_D
