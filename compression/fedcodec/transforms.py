"""What is done to an update before any of it is left out: its norm bounded, noise added. Decoding undoes neither."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import numpy as np
from pydantic import Field

from fedcodec.base import Kind, Traits
from fedcore.draws import Draws
from fedcore.layout import Vector
from fedcore.plugin import Plugin

_BELOW_ONE: Final = 1 - 2.0**-22
"""Rounding to float32 makes a value longer by at most 2^-24 of it: so no clipped vector is longer than the bound."""


class Clip(Plugin):
    """Scales a vector that is longer than `norm` down to it, in the L2 norm. A shorter one is left as it is.

    McMahan et al., Learning Differentially Private Recurrent Language Models, 2018, section 2.
    """

    name: ClassVar[str] = "clip"
    wire_id: ClassVar[int] = 70
    kind: ClassVar[Kind] = "clip"
    traits: ClassVar[Traits] = Traits()

    norm: Annotated[float, Field(ge=1e-30, le=1e30, description="Largest L2 norm of an update.")] = 1.0

    def apply(self, values_D: Vector, rng: Draws) -> Vector:
        """See `Transform.apply`; draws nothing. Of a vector that is not finite a value stays so."""
        with np.errstate(invalid="ignore"):  # infinity times 0, signalling NaNs
            length = float(np.sqrt(np.sum(np.square(values_D, dtype=np.float64))))
            if length <= self.norm:
                return values_D
            scaled: Vector = (values_D * np.float64(self.norm / length * _BELOW_ONE)).astype(np.float32)
        return scaled


class GaussianNoise(Plugin):
    """Adds a normal draw to every value. After `clip`, it bounds what the update tells of any one of its causes.

    Dwork, Roth: The Algorithmic Foundations of Differential Privacy, 2014, section 3.5.1. Draws and sum are binary64,
    the result is rounded to binary32; what the low bits of such numbers may tell (Mironov, On Significance of the
    Least Significant Bits, 2012) is not mended. This stage promises no epsilon.
    """

    name: ClassVar[str] = "gaussian-noise"
    wire_id: ClassVar[int] = 71
    kind: ClassVar[Kind] = "noise"
    traits: ClassVar[Traits] = Traits(unbiased=True, changes_sensitivity=True, private_draws=True)

    std: Annotated[float, Field(ge=1e-30, le=1e30, description="Standard deviation of the noise on each value.")] = 0.01

    def apply(self, values_D: Vector, rng: Draws) -> Vector:
        """See `Transform.apply`; draws D normal numbers."""
        with np.errstate(over="ignore", invalid="ignore"):
            noisy: Vector = (values_D + self.std * rng.standard_normal(values_D.size)).astype(np.float32)
        return noisy
