"""A stretch of an update: what a codec decodes to and a rule adds up.

Shape legend: D values in the stretch, n of them given one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.layout import Vector


class Part(NamedTuple):
    """Values from `start` on, `size` of them.

    Attributes:
        start: index of the first one in the flat vector.
        size: D, at least 1.
        positions_n: ascending indices, counted from `start`, of the values given; None: all D are given.
        given_n: float32 values, or with a book unsigned integers: where in it each value stands. Perhaps a read-only
            view that is good until the next part is asked for.
        book: float32; None: values are given themselves.
        rest: every value that is not given.
    """

    start: int
    size: int
    positions_n: npt.NDArray[np.signedinteger[Any]] | None
    given_n: npt.NDArray[Any]
    book: Vector | None = None
    rest: float = 0.0

    @property
    def values_n(self) -> Vector:
        """The values given, looked up anew on each call."""
        return self.given_n if self.book is None else self.book[self.given_n]

    def dense(self) -> Vector:
        """Return all D values."""
        values_n = self.values_n
        if self.positions_n is None:
            return values_n
        values_D = np.full(self.size, self.rest, dtype=np.float32)
        values_D[self.positions_n] = values_n
        return values_D


def dense_blocks(parts: Iterable[Part], block_values: int) -> Iterator[Vector]:
    """Yield the values of consecutive parts in blocks of at most `block_values`; a block never crosses two parts."""
    for part in parts:
        for start in range(0, part.size, block_values):
            size = min(block_values, part.size - start)
            first, end, inner = start, start + size, None
            if part.positions_n is not None:
                # With numbers of another type it would copy all positions for each block.
                ends = np.array((start, start + size), dtype=part.positions_n.dtype)
                first, end = np.searchsorted(part.positions_n, ends)
                inner = part.positions_n[first:end] - start
            yield Part(start, size, inner, part.given_n[first:end], part.book, part.rest).dense()


def dense_parts(blocks: Iterable[Vector]) -> Iterator[Part]:
    """Yield consecutive blocks of values as parts."""
    start = 0
    for block in blocks:
        yield Part(start, block.size, None, block)
        start += block.size
