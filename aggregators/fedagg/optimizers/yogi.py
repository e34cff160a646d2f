"""FedYogi: as FedAdam, but v moves towards Δ² by an amount that does not depend on v."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from fedagg.optimizers.adaptive import Adaptive
from fedcore.layout import Vector


class Yogi(Adaptive):
    """v ← v − (1 − β₂) Δ² sign(v − Δ²); the rest is in `Adaptive`."""

    name: ClassVar[str] = "yogi"

    beta2: float = Field(default=0.99, ge=0, lt=1, description="β₂; v moves by (1 − β₂) Δ².")

    def _update_v(self, v_D: Vector, squared_D: Vector) -> None:
        v_D -= (1 - self.beta2) * squared_D * np.sign(v_D - squared_D)
