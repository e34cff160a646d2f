"""Floating-point numbers: their bits are the codes."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedcodec.base import LOSSLESS, Coded, Codes, Decoded, Kind, Traits
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.layout import Vector
from fedcore.plugin import Plugin

CHUNK_VALUES: Final = 1 << 14
"""Values rounded at once: what is computed on the way stays in a core's cache."""

_EXPONENT: Final = np.uint32(0x7F80_0000)
_MAGNITUDE: Final = np.uint32(0x7FFF_FFFF)
_QUIET: Final = np.uint32(0x0040)


class _Floats(Plugin):
    """What the formats have in common: no table, and a code for each value."""

    kind: ClassVar[Kind] = "quantise"
    drops: ClassVar[bool] = False
    may_send_as_is: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    bits: ClassVar[int]

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`."""
        return 1 << self.bits

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 0

    def read_table(self, reader: Reader, num_values: int) -> None:
        """See `Quantiser.read_table`: there is none."""

    def rest(self, table: None) -> float:
        """See `Quantiser.rest`."""
        return 0.0


class Raw(_Floats):
    """IEEE 754 binary32; NaN payloads and signed zeros survive."""

    name: ClassVar[str] = "raw"
    wire_id: ClassVar[int] = 1
    traits: ClassVar[Traits] = LOSSLESS
    bits: ClassVar[int] = 32

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing."""
        return Coded(values_n.view(np.uint32), b"")

    def decode(self, codes: Codes, table: None, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        return Decoded(codes.view(np.float32))


class Bf16(_Floats):
    """bfloat16: 8 bits of precision over float32's range. Kalamkar et al., A Study of BFLOAT16, 2019.

    Rounds to nearest, ties to even. Infinities and signed zeros survive; a NaN stays a NaN and becomes
    quiet. Finite values of magnitude 0x1.FFp+127 (about 3.3961775e38) and above become infinities, as in every
    IEEE 754 rounding.
    """

    name: ClassVar[str] = "bf16"
    wire_id: ClassVar[int] = 2
    # Rounding up can make a clipped vector longer than its bound, by up to one part in 256.
    traits: ClassVar[Traits] = Traits(contraction=True, changes_sensitivity=True)
    bits: ClassVar[int] = 16

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing."""
        return Coded(round_to_bf16(values_n), b"")

    def decode(self, codes: Codes, table: None, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        bits: npt.NDArray[Any] = codes.astype(np.uint32) << np.uint32(16)
        return Decoded(bits.view(np.float32))


class Fp16(_Floats):
    """IEEE 754 binary16: 11 bits of precision, from about 6e-8 to 65504; what is larger becomes an infinity."""

    name: ClassVar[str] = "fp16"
    wire_id: ClassVar[int] = 3
    traits: ClassVar[Traits] = Traits(changes_sensitivity=True)  # tiny values vanish, so it is no contraction
    bits: ClassVar[int] = 16

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing. A NaN becomes 0x7E00."""
        with np.errstate(over="ignore", under="ignore"):
            halves_n = values_n.astype(np.float16).view(np.uint16)
        np.copyto(halves_n, np.uint16(0x7E00), where=np.isnan(values_n))
        return Coded(halves_n, b"")

    def decode(self, codes: Codes, table: None, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        return Decoded(codes.view(np.float16).astype(np.float32))


def round_to_bf16(values_n: Vector) -> npt.NDArray[np.uint16]:
    """Return the bfloat16 pattern of each value, rounded as `Bf16` says."""
    bits_n = np.ascontiguousarray(values_n, dtype="<f4").view(np.uint32)
    halves_n = np.empty(bits_n.size, dtype="<u2")
    for start in range(0, bits_n.size, CHUNK_VALUES):
        halves_n[start : start + CHUNK_VALUES] = _round(bits_n[start : start + CHUNK_VALUES])
    return halves_n


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
