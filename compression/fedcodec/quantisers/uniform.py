"""Evenly spaced levels with a scale for each block of values, rounded up or down at random.

Shape legend: n values, b whole blocks of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import numpy as np
from pydantic import Field

from fedcodec.base import Coded, Codes, Decoded, Kind, Traits
from fedcodec.quantisers.floats import CHUNK_VALUES
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.errors import FrameError
from fedcore.layout import Vector
from fedcore.plugin import Plugin

_LARGEST: Final = np.uint32(0x7F7F_FFFF)
_NAN: Final = np.uint32(0x7FC0_0000)


class _Uniform(Plugin):
    """Levels from −L to L; level l stands for l / L times the block's scale, its largest magnitude.

    With t = x / scale · L a value becomes ⌊t⌋ + 1 if a draw from the multiples of 2^-24 in [0, 1) is below t − ⌊t⌋, and
    ⌊t⌋ otherwise. What float32 rounds on the way leaves the mean at most 2^-22 · (|x| + scale / L) beside x, and the
    smallest float32 for each that is below 2^-126.

    A block with a value that is not finite decodes to NaN.
    """

    kind: ClassVar[Kind] = "quantise"
    drops: ClassVar[bool] = False
    may_send_as_is: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    levels: ClassVar[int]
    block: int

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`."""
        return 2 * self.levels + 1

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws one float32 for each value, in order."""
        codes_n = np.empty(values_n.size, dtype=np.uint8)
        scales = np.empty(self._num_blocks(values_n.size), dtype="<f4")
        num_rows = max(1, CHUNK_VALUES // self.block)
        for first in range(0, scales.size, num_rows):
            chunk = slice(first * self.block, (first + num_rows) * self.block)
            levels, scales[first : first + num_rows] = self._scale(values_n[chunk])
            floors = np.floor(levels)
            levels -= floors
            floors += rng.random(levels.size, dtype=np.float32) < levels
            floors += np.float32(self.levels)
            codes_n[chunk] = floors
        return Coded(codes_n, scales.tobytes())

    def _scale(self, values_n: Vector) -> tuple[Vector, Vector]:
        """Return each value in levels, and the scales of the blocks."""
        missing = -values_n.size % self.block
        values_b: Vector = (np.pad(values_n, (0, missing)) if missing else values_n).reshape(-1, self.block)
        with np.errstate(invalid="ignore"):
            scales: Vector = np.abs(values_b).max(axis=1)
            is_bad = ~np.isfinite(scales)
        if is_bad.any():
            values_b = np.where(is_bad[:, None], np.float32(0), values_b)
            scales[is_bad] = _NAN.view(np.float32)
        divisors: Vector = np.where(scales > 0, scales, 1).astype(np.float32, copy=False)
        levels_b: Vector = values_b / divisors[:, None]
        levels_b *= np.float32(self.levels)
        return levels_b.ravel()[: values_n.size], scales

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 4 * self._num_blocks(num_values)

    def read_table(self, reader: Reader, num_values: int) -> Vector:
        """See `Quantiser.read_table`: the scales."""
        scales: Vector = np.frombuffer(reader.take(self.max_table_bytes(num_values), "scales"), dtype="<f4")
        bits = scales.view(np.uint32)
        if ((bits > _LARGEST) & (bits != _NAN)).any():
            raise FrameError("a scale is negative, infinite, or a NaN of another pattern")
        return scales

    def decode(self, codes: Codes, table: Vector, start: int) -> Decoded:
        """See `Quantiser.decode`.

        Raises:
            FrameError: a block whose scale says that all levels are 0 has others.
        """
        values_n = np.empty(codes.size, dtype=np.float32)
        at = 0
        while at < codes.size:
            first, inside = divmod(start + at, self.block)
            num_rows = min(CHUNK_VALUES, codes.size - at) // self.block
            # A block that was begun before, or that ends after these codes, goes by itself.
            size = min(self.block - inside, codes.size - at) if inside or num_rows == 0 else num_rows * self.block
            scales_b = table[first : first + (num_rows if size > self.block else 1), None]
            codes_b = codes[at : at + size].reshape(scales_b.size, -1)
            if not (scales_b > 0).all() and ((codes_b != self.levels) & ~(scales_b > 0)).any():
                raise FrameError("a level other than 0 in a block of which the scale is 0 or NaN")
            values_b = values_n[at : at + size].reshape(scales_b.size, -1)
            np.subtract(codes_b, np.float32(self.levels), out=values_b)
            values_b /= np.float32(self.levels)
            values_b *= scales_b
            at += size
        return Decoded(values_n)

    def rest(self, table: Vector) -> float:
        """See `Quantiser.rest`."""
        return 0.0

    def _num_blocks(self, num_values: int) -> int:
        return -(-num_values // self.block)


class Int8(_Uniform):
    """255 levels, 8 bits each. Alistarh et al., QSGD, 2017, with the largest magnitude of a block for its norm."""

    name: ClassVar[str] = "int8"
    wire_id: ClassVar[int] = 32
    # Rounding loses f (1 − f) on average at f of a level, that is above f² by at most 1 / 8, nothing at the largest
    # value, L levels: less than everything while a block has at most 8 L² values.
    traits: ClassVar[Traits] = Traits(unbiased=True, contraction=True, changes_sensitivity=True)
    levels: ClassVar[int] = 127

    block: Annotated[int, Field(ge=1, le=1 << 16, description="Values that share a scale.")] = 256


class Int4(_Uniform):
    """15 levels, 4 bits each with `fixed-symbols`; see `Int8`."""

    name: ClassVar[str] = "int4"
    wire_id: ClassVar[int] = 33
    # As for 8 bits; with more than 392 values in a block it would be no contraction.
    traits: ClassVar[Traits] = Traits(unbiased=True, contraction=True, changes_sensitivity=True)
    levels: ClassVar[int] = 7

    block: Annotated[int, Field(ge=1, le=256, description="Values that share a scale.")] = 256


class Int2(_Uniform):
    """3 levels, 2 bits each with `fixed-symbols`. Wen et al., TernGrad, 2017, by blocks."""

    name: ClassVar[str] = "int2"
    wire_id: ClassVar[int] = 34
    traits: ClassVar[Traits] = Traits(unbiased=True, changes_sensitivity=True)
    levels: ClassVar[int] = 1

    block: Annotated[int, Field(ge=1, le=1 << 16, description="Values that share a scale.")] = 256
