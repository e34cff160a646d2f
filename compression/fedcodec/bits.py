"""Numbers of a fixed number of bits, one after the other: the first in the lowest bits of the first byte."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.errors import FrameError

_CHUNK: Final = 1 << 15
"""Numbers at once: their bits, a byte each on the way, stay in a core's cache. A multiple of 8."""


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(numbers_n: npt.NDArray[Any], width: int) -> bytes | memoryview:
    """Return unsigned integers of at most `width` bits as bytes; the last one ends with zero bits.

    Args:
        numbers_n: uint8, uint16, uint32 or uint64.
        width: from 0 to 64.
    """
    if width == 0:
        return b""
    if width == 8 * numbers_n.itemsize:
        return numbers_n.astype(numbers_n.dtype.newbyteorder("<"), copy=False).data.cast("B")
    found = np.empty(packed_bytes(numbers_n.size, width), dtype=np.uint8)
    shifts = np.arange(width, dtype=numbers_n.dtype)
    for start in range(0, numbers_n.size, _CHUNK):
        chunk = numbers_n[start : start + _CHUNK]
        at = start * width // 8
        if width in (1, 2, 4) and chunk.dtype == np.uint8:
            found[at : at + packed_bytes(chunk.size, width)] = _pack_within_bytes(chunk, width)
        else:
            bits = ((chunk[:, None] >> shifts) & numbers_n.dtype.type(1)).astype(np.uint8)
            found[at : at + packed_bytes(chunk.size, width)] = np.packbits(bits.ravel(), bitorder="little")
    return found.data


def unpack(data: memoryview, count: int, width: int, dtype: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    """Return `count` numbers of `width` bits from exactly `packed_bytes(count, width)` bytes.

    Raises:
        FrameError: the bits behind the last number are not zero.
    """
    if width == 0:
        return np.zeros(count, dtype=dtype)
    if width == 8 * np.dtype(dtype).itemsize:
        return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))
    found = np.empty(count, dtype=dtype)
    source = np.frombuffer(data, dtype=np.uint8)
    weights = dtype(1) << np.arange(width, dtype=dtype)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        part = source[start * width // 8 : start * width // 8 + packed_bytes(size, width)]
        if width in (1, 2, 4) and dtype is np.uint8:
            found[start : start + size] = _unpack_within_bytes(part, width)[:size]
        else:
            bits = np.unpackbits(part, count=size * width, bitorder="little").reshape(size, width)
            np.sum(bits * weights, axis=1, out=found[start : start + size], dtype=dtype)
    used = count * width % 8
    if used and source[-1] >> used:
        raise FrameError("bits behind the last code are not zero")
    return found


def _pack_within_bytes(numbers_n: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    per_byte = 8 // width
    padded = np.zeros(-(-numbers_n.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: numbers_n.size] = numbers_n
    columns = padded.reshape(-1, per_byte)
    found = columns[:, 0].copy()
    for place in range(1, per_byte):
        found |= columns[:, place] << np.uint8(place * width)
    return found


def _unpack_within_bytes(source: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    per_byte = 8 // width
    found = np.empty((source.size, per_byte), dtype=np.uint8)
    mask = np.uint8((1 << width) - 1)
    for place in range(per_byte):
        found[:, place] = (source >> np.uint8(place * width)) & mask
    return found.ravel()
