"""What FedAdagrad, FedAdam and FedYogi share: all of algorithm 2 but the line that updates v.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated Optimization, 2021.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedcore.layout import Vector
from fedcore.plugin import Plugin


class Adaptive(Plugin):
    """m ← β₁ m + (1 − β₁) Δ; v ← …; x ← x + η m / (√v + τ).

    There is no bias correction, as in the paper. m starts at 0 and v at τ², the smallest that the paper
    allows.
    """

    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    learning_rate: float = Field(default=0.01, gt=0, le=1000, description="η, the server's step size.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="β₁, how much of m is kept.")
    # The square of the smallest is a normal float32, so √v + τ never vanishes.
    tau: float = Field(default=1e-3, ge=1e-12, le=1000, description="τ, the degree of adaptivity.")

    def initial(self, slot: str) -> float:
        """See `ServerOptimizer.initial`."""
        match slot:
            case "m":
                return 0.0
            case "v":
                return self.tau**2
        raise ValueError(f"{self.name} has no slot {slot!r}")

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        """See `ServerOptimizer.step`."""
        m_D, v_D = slots_D["m"], slots_D["v"]
        m_D *= self.beta1
        m_D += (1 - self.beta1) * mean_D
        self._update_v(v_D, mean_D * mean_D)
        root_D: Vector = np.sqrt(v_D)
        root_D += self.tau
        return self.learning_rate * m_D / root_D

    @abstractmethod
    def _update_v(self, v_D: Vector, squared_D: Vector) -> None:
        """Update v in place from Δ²; it stays finite and does not become negative."""
