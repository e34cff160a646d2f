"""The upper half of each float32, rounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedcodec.base import BLOCK_VALUES, Traits
from fedcodec.frame import check_payload_bytes
from fedcore.layout import Vector
from fedcore.plugin import Plugin

CHUNK_VALUES: Final = 1 << 14
"""Values rounded at once: what is computed on the way stays in a core's cache."""

_EXPONENT: Final = np.uint32(0x7F80_0000)
_MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
_QUIET: Final = np.uint32(0x0040)


class Bf16(Plugin):
    """bfloat16, little-endian, two bytes a value: 8 bits of precision over float32's range.

    Rounds to nearest, ties to even. Infinities and signed zeros survive; a NaN stays a NaN and becomes
    quiet. Finite values of magnitude 0x1.FFp+127 (about 3.3961775e38) and above become infinities, as in every
    IEEE 754 rounding.
    """

    name: ClassVar[str] = "bf16"
    wire_id: ClassVar[int] = 2
    traits: ClassVar[Traits] = Traits(
        lossless=False,
        unbiased=False,
        contraction=True,
        integer_sum=False,
        # Rounding up can make a clipped vector longer than its bound, by up to one part in 256.
        changes_sensitivity=True,
        streams=True,
    )

    def encode(self, values_D: Vector, rng: np.random.Generator) -> memoryview:
        """See `Codec.encode`; draws nothing."""
        bits_D = np.ascontiguousarray(values_D, dtype=np.float32).view(np.uint32)
        halves_D = np.empty(bits_D.size, dtype="<u2")
        for start in range(0, bits_D.size, CHUNK_VALUES):
            halves_D[start : start + CHUNK_VALUES] = _round(bits_D[start : start + CHUNK_VALUES])
        return halves_D.view(np.uint8).data

    def max_payload_bytes(self, num_values: int) -> int:
        """See `Codec.max_payload_bytes`."""
        return 2 * num_values

    def blocks(self, payload: memoryview, num_values: int, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """See `Codec.blocks`; the length is checked on the call."""
        check_payload_bytes(self.name, payload, 2 * num_values)
        halves_D: npt.NDArray[Any] = np.frombuffer(payload, dtype="<u2")
        return (
            (halves_D[start : start + block_values].astype(np.uint32) << np.uint32(16)).view(np.float32)
            for start in range(0, num_values, block_values)
        )


def _round(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return the bfloat16 pattern of each float32 pattern.

    Adding 0x7FFF and the lowest kept bit carries into the kept half exactly when the cut half is above one
    half, or is one half and the kept half is odd. The carry may step the exponent, which is the right
    neighbour too.
    """
    upper = bits >> np.uint32(16)
    rounded = upper & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    # Wraps for some NaNs only, which are replaced below.
    rounded += bits
    rounded >>= np.uint32(16)
    nan = (bits & _MAGNITUDE) > _EXPONENT
    if nan.any():
        np.copyto(rounded, upper | _QUIET, where=nan)
    return rounded
