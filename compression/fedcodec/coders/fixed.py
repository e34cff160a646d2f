"""Positions and codes of fixed width: what is done if a job names nothing else."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedcodec.base import LOSSLESS, Codes, Kind, Positions, Traits, code_type, position_type
from fedcodec.bits import pack, packed_bytes, unpack
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.plugin import Plugin


class FixedPositions(Plugin):
    """Each position by itself in ⌈log2 D⌉ bits."""

    name: ClassVar[str] = "fixed-positions"
    wire_id: ClassVar[int] = 40
    kind: ClassVar[Kind] = "positions"
    traits: ClassVar[Traits] = LOSSLESS

    def encode(self, positions_n: Positions, size: int) -> bytes:
        """See `PositionCoder.encode`."""
        return bytes(pack(positions_n.astype(np.uint64), (size - 1).bit_length()))

    def max_bytes(self, count: int, size: int) -> int:
        """See `PositionCoder.max_bytes`."""
        return packed_bytes(count, (size - 1).bit_length())

    def decode(self, reader: Reader, count: int, size: int) -> Positions:
        """See `PositionCoder.decode`."""
        data = reader.take(self.max_bytes(count, size), "positions")
        dtype = position_type(size)
        unsigned = np.uint32 if dtype is np.int32 else np.uint64
        positions_n: Positions = unpack(data, count, (size - 1).bit_length(), unsigned).view(dtype)
        check_positions(positions_n, size)
        return positions_n


class FixedSymbols(Plugin):
    """Each code by itself in ⌈log2 of their number⌉ bits."""

    name: ClassVar[str] = "fixed-symbols"
    wire_id: ClassVar[int] = 50
    kind: ClassVar[Kind] = "symbols"
    traits: ClassVar[Traits] = LOSSLESS
    max_codes: ClassVar[int] = 1 << 32
    streams: ClassVar[bool] = True

    def encode(self, codes_n: Codes, num_codes: int) -> bytes | memoryview:
        """See `SymbolCoder.encode`."""
        return pack(codes_n, (num_codes - 1).bit_length())

    def max_bytes(self, count: int, num_codes: int) -> int:
        """See `SymbolCoder.max_bytes`."""
        return packed_bytes(count, (num_codes - 1).bit_length())

    def decode(self, reader: Reader, count: int, num_codes: int) -> Codes:
        """See `SymbolCoder.decode`."""
        data = reader.take(self.max_bytes(count, num_codes), "codes")
        codes_n = unpack(data, count, (num_codes - 1).bit_length(), code_type(num_codes))
        if num_codes & (num_codes - 1) and codes_n.size and codes_n.max() >= num_codes:
            raise FrameError(f"code {codes_n.max()}: below {num_codes}")
        return codes_n


def check_positions(positions_n: Positions, size: int) -> None:
    """Check what was read.

    Raises:
        FrameError: the positions are not ascending, or one is not below `size`.
    """
    if positions_n.size:
        if (positions_n[1:] <= positions_n[:-1]).any():
            raise FrameError("positions are not ascending")
        if positions_n[0] < 0 or positions_n[-1] >= size:
            raise FrameError(f"position {positions_n[-1]}: below {size}")
