"""The randomized quantization mechanism: stochastic rounding between levels that are themselves drawn."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fedcodec.base import Coded, Codes, Decoded, Kind, Traits, code_type
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.layout import Vector
from fedcore.plugin import Plugin

CHUNK_VALUES: Final = 1 << 14
"""Values drawn for at once: what is computed on the way stays in a core's cache."""
MAX_BOUND: Final = 2.0**100
MIN_EXTENSION: Final = 2.0**-20
"""Of the clip: below it an end level is so rarely hit from the other end that it may as well never be."""


class Rqm(Plugin):
    """Each value becomes one of some levels; which one says little of the value.

    Youn, Hu, Ziani, Abernethy: Randomized Quantization is All You Need for Differential Privacy in Federated
    Learning, 2023, algorithm 2. A value is clipped to ±clip. The levels lie evenly on ±(clip + extension). The
    two outer ones are kept and each inner one is with probability `keep`, drawn anew for every value; the value
    goes to the next kept level below or above, with probabilities that make the mean right.

    This is private only while the draws are: who can guess `rng` has the value between two levels. A client
    that counts on it must pass a generator seeded from the operating system's entropy, never from a job's
    seed. Draws are binary64, so probabilities are met to about 2^-53. `pmf` is what an accountant needs; a
    bound for a whole vector follows by adding up, and is large for a long one.
    """

    name: ClassVar[str] = "rqm"
    wire_id: ClassVar[int] = 37
    kind: ClassVar[Kind] = "quantise"
    # Unbiased for values within the clip.
    traits: ClassVar[Traits] = Traits(unbiased=True, integer_sum=True, changes_sensitivity=True, private_draws=True)
    drops: ClassVar[bool] = False
    may_send_as_is: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    levels: Annotated[int, Field(ge=2, le=1 << 16, description="How many levels there are.")] = 16
    keep: Annotated[float, Field(gt=0, lt=1, description="Probability with which an inner level is kept.")] = 0.42
    clip: Annotated[float, Field(ge=1 / MAX_BOUND, le=MAX_BOUND, description="Largest magnitude of a value.")] = 1.0
    extension: Annotated[
        float,
        Field(ge=MIN_EXTENSION / MAX_BOUND, le=MAX_BOUND, description="How far the levels go beyond the clip."),
    ] = 1.0

    @model_validator(mode="after")
    def _levels_go_beyond_the_clip(self) -> Self:
        if self.extension < MIN_EXTENSION * self.clip:
            raise ValueError(f"extension {self.extension}: at least {MIN_EXTENSION} of clip {self.clip}")
        return self

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`."""
        return self.levels

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws three numbers a value, see docs/wire-format.md. NaN is taken for 0."""
        codes_n = np.empty(values_n.size, dtype=code_type(self.levels))
        for start in range(0, values_n.size, CHUNK_VALUES):
            codes_n[start : start + CHUNK_VALUES] = self._draw(values_n[start : start + CHUNK_VALUES], rng)
        return Coded(codes_n, b"")

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 0

    def read_table(self, reader: Reader, num_values: int) -> None:
        """See `Quantiser.read_table`: there is none."""

    def decode(self, codes: Codes, table: None, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        top = self.levels - 1
        places = np.arange(-top, top + 1, 2, dtype=np.float64)
        values: Vector = ((self.clip + self.extension) * places / top).astype(np.float32)
        return Decoded(codes, values)

    def rest(self, table: None) -> float:
        """See `Quantiser.rest`."""
        return 0.0

    def _draw(self, values: Vector, rng: Draws) -> npt.NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            exact = values.astype(np.float64)
        at = place(np.nan_to_num(exact, copy=False), self.levels, self.clip, self.extension)
        below = np.minimum(np.floor(at), self.levels - 2)
        # The levels passed on the way to a kept one are geometric: the whole part of an exponential draw.
        rate = -np.log1p(-self.keep)
        lower = np.maximum(below - np.floor(rng.standard_exponential(values.size) / rate), 0)
        upper = np.minimum(below + 1 + np.floor(rng.standard_exponential(values.size) / rate), self.levels - 1)
        found: npt.NDArray[np.float64] = np.where(rng.random(values.size) * (upper - lower) < at - lower, upper, lower)
        return found


def place(values: Any, levels: int, clip: float, extension: float) -> Any:
    """Return where clipped values lie among the levels: 0 is the lowest, levels − 1 the highest."""
    reach = clip + extension
    return (np.clip(values, -clip, clip) + reach) / (2 * reach) * (levels - 1)


def pmf(x: float, levels: int, keep: float, clip: float, extension: float) -> npt.NDArray[np.float64]:
    """Return the probability of each level for a value, in closed form, in O(levels²).

    With j the level at or below x: the next kept level below is a with probability keep (1 − keep)^(j − a),
    or without the first factor if a = 0, and independently the next above is b with keep (1 − keep)^(b − j − 1),
    or without the first factor if b = levels − 1. Between them x is rounded stochastically.
    """
    at = float(place(x, levels, clip, extension))
    below = min(int(at), levels - 2)
    lower, upper = np.arange(below + 1), np.arange(below + 1, levels)
    probability_lower = np.where(lower > 0, keep, 1.0) * (1 - keep) ** (below - lower)
    probability_upper = np.where(upper < levels - 1, keep, 1.0) * (1 - keep) ** (upper - below - 1)
    found = np.zeros(levels)
    for level, probability in zip(lower, probability_lower, strict=True):
        up = (at - level) / (upper - level)
        found[upper] += probability * probability_upper * up
        found[level] = probability * (probability_upper @ (1 - up))
    return found
