"""Positions as the gaps between them, in few bits where gaps are small.

Golomb: Run-length encodings, 1966; Rice, Plaunt: Adaptive Variable-Length Coding, 1971.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from fedcodec.base import LOSSLESS, Kind, Positions, Traits, position_type
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.plugin import Plugin

MAX_WIDTH: Final = 31
"""The parameter has 5 bits."""

_BLOCK_BITS: Final = 1 << 14
"""Bits in which codes are found at once: what that takes stays in a core's cache. A multiple of 8."""

_CHUNK_VALUES: Final = 1 << 14
"""Positions whose gaps are looked at at once, for the same reason."""

_Ints = npt.NDArray[np.int64]


class Rice(Plugin):
    """Golomb-Rice: what a gap is divided by is a power of two, the one with which all gaps together are shortest.

    The width w, one byte, comes first. Then for each position: how many lie between it and the one before (the
    first: below it), divided by 2^w: the quotient as so many ones and a zero, the remainder in w bits. At random
    positions this takes at most 3 % more than their entropy if one in ten or fewer are written.
    """

    name: ClassVar[str] = "rice"
    wire_id: ClassVar[int] = 41
    kind: ClassVar[Kind] = "positions"
    traits: ClassVar[Traits] = LOSSLESS

    def encode(self, positions_n: Positions, size: int) -> bytes:
        """See `PositionCoder.encode`."""
        gaps_n = np.diff(positions_n, prepend=-1) - 1
        width = best_width(positions_n)
        ends_n = np.cumsum((gaps_n >> width) + (1 + width)) - (1 + width)
        # All ones, but for the zero that ends each quotient and the remainder behind it.
        bits = np.ones(int(ends_n[-1]) + 1 + width if ends_n.size else 0, dtype=np.uint8)
        bits[ends_n] = 0
        for place in range(width):
            bits[ends_n + (1 + place)] = (gaps_n >> place) & 1
        return bytes([width]) + np.packbits(bits, bitorder="little").tobytes()

    def max_bytes(self, count: int, size: int) -> int:
        """See `PositionCoder.max_bytes`; the bound grows with `count`."""
        return 1 + -(-min(_max_bits(count, size, width) for width in range(MAX_WIDTH + 1)) // 8)

    def decode(self, reader: Reader, count: int, size: int) -> Positions:
        """See `PositionCoder.decode`."""
        width = reader.take(1, "width of remainders")[0]
        if width > MAX_WIDTH:
            raise FrameError(f"remainders of {width} bits, at most {MAX_WIDTH}")
        # The gaps' sum is at most size − count, so the quotients' sum is bounded, and with it what is looked at.
        most_bits = _max_bits(count, size, width)
        data = np.frombuffer(reader.ahead(-(-most_bits // 8)), dtype=np.uint8)
        most_bits = min(most_bits, 8 * data.size)
        if count * (1 + width) > most_bits:
            raise FrameError(f"{count} positions in {most_bits} bits")
        positions_n: Positions = np.empty(count, dtype=position_type(size))
        num_bits = num_found = 0
        before = -1
        for ends in _quotient_ends(data, count, width, most_bits):
            quotients = np.diff(ends, prepend=num_bits - 1 - width) - (1 + width)
            positions = before + np.cumsum((quotients << width) + _numbers_at(data, ends + 1, width) + 1)
            before = int(positions[-1])
            if before >= size:
                raise FrameError(f"position {before}: below {size}")
            positions_n[num_found : num_found + ends.size] = positions
            num_found += ends.size
            num_bits = int(ends[-1]) + 1 + width
        if num_found < count or num_bits > most_bits:
            raise FrameError(f"{count} positions are cut short, or go beyond the last one")
        used = reader.take(-(-num_bits // 8), "positions")
        if num_bits % 8 and used[-1] >> num_bits % 8:
            raise FrameError("bits behind the last position are not zero")
        if width != best_width(positions_n):
            raise FrameError(f"remainders of {width} bits, shortest are {best_width(positions_n)}")
        return positions_n


def best_width(positions_n: Positions) -> int:
    """Return the width with which the gaps between positions take the fewest bits, of equal ones the smallest.

    One bit wider costs a bit a gap and saves ⌈q / 2⌉ for each quotient q. That falls with the width, so the first
    width is best that is not worth widening; and none is once it divides by the mean or more.
    """
    count = positions_n.size
    if not count:
        return 0
    total = int(positions_n[-1]) + 1 - count
    width = min(MAX_WIDTH, max(0, -(-total // count) - 1).bit_length())
    while width and sum(int((((gaps >> (width - 1)) + 1) >> 1).sum()) for gaps in _gaps(positions_n)) <= count:
        width -= 1
    return width


def _gaps(positions_n: Positions) -> Iterator[_Ints]:
    """Yield the gaps of a chunk of positions after the other."""
    before = -1
    for start in range(0, positions_n.size, _CHUNK_VALUES):
        chunk = positions_n[start : start + _CHUNK_VALUES].astype(np.int64, copy=False)
        yield np.diff(chunk, prepend=before) - 1
        before = int(chunk[-1])


def _max_bits(count: int, size: int, width: int) -> int:
    return count * (1 + width) + ((size - count) >> width)


def _quotient_ends(data: npt.NDArray[np.uint8], count: int, width: int, num_bits: int) -> Iterator[_Ints]:
    """Yield where each quotient's zero is, `count` of them at most, those that begin in a block together."""
    start = 0
    while count and start < num_bits:
        block = start // 8 * 8
        bits = np.unpackbits(data[block // 8 : (block + _BLOCK_BITS) // 8], bitorder="little")
        ends = block + _ends_within(bits, start - block, width)[:count]
        # No end in a block: it is all ones.
        start = block + _BLOCK_BITS
        if ends.size:
            yield ends
            count -= ends.size
            start = int(ends[-1]) + 1 + width


def _ends_within(bits: npt.NDArray[np.uint8], start: int, width: int) -> _Ints:
    """Return where in a block the zeros are that end quotients, `start` being the first bit of one.

    From each zero, as if it ended a quotient, the next end is the first zero behind the remainder. Following
    these steps from the first is done in strides that double.
    """
    zeros = np.flatnonzero(bits == 0)
    if not width:
        return zeros[np.searchsorted(zeros, start) :]
    zeros_before = np.zeros(bits.size + 2 + width, dtype=np.int64)
    np.cumsum(bits == 0, out=zeros_before[1 : bits.size + 1])
    zeros_before[bits.size + 1 :] = zeros.size
    stride = np.append(zeros_before[zeros + (1 + width)], zeros.size)
    path = zeros_before[[start]]
    while path[-1] < zeros.size:
        path = np.concatenate((path, stride[path]))
        stride = stride[stride]
    return zeros[path[path < zeros.size]]


def _numbers_at(data: npt.NDArray[np.uint8], starts_n: _Ints, width: int) -> _Ints:
    """Return the numbers of `width` bits that begin at these bits; behind the data are zeros."""
    if not width:
        return np.zeros(starts_n.size, dtype=np.int64)
    first, end = int(starts_n[0]) >> 3, (int(starts_n[-1]) >> 3) + 8
    padded = np.zeros(end - first, dtype=np.uint8)
    padded[: max(0, data.size - first)] = data[first:end]
    # The eight bytes from each byte on.
    windows = np.ndarray(end - first - 7, dtype="<u8", buffer=padded, strides=(1,))
    words_n = windows[(starts_n >> 3) - first]
    numbers_n: _Ints = (words_n >> (starts_n & 7).astype(np.uint64)).astype(np.int64)
    return numbers_n & ((1 << width) - 1)
