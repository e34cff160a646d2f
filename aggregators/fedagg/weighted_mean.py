"""The weighted mean, summed exactly.

Federated averaging: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized
Data, 2017, algorithm 1, on differences instead of weights.

Floating-point sums depend on their order. Here every update is rounded once, by itself, to a fixed-point
grid, and the integers are added: the same updates give the same bits in any order, in any grouping, and
after a restart.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedagg.base import BLOCK_VALUES, Capacity, Fold, RuleTraits, ceil_log2
from fedcore.layout import Vector
from fedcore.part import Part
from fedcore.plugin import Plugin

CHUNK_VALUES: Final = 1 << 14
"""Values handled at once: the buffers and the chunk's sums stay in a core's cache."""


def scale_bits(capacity: Capacity) -> int:
    """Return s: a value x of weight w is added as the integer rint(x · w · 2^s).

    With n, w and a the binary logarithms of the three bounds, rounded up, s = 62 − n − w − a. Each addend
    is then at most 2^(62 − n) in magnitude (that bound is an integer, so rounding does not exceed it), and
    2^n of them at most 2^62: int64 cannot overflow.
    """
    mantissa, exponent = math.frexp(capacity.max_abs)
    abs_bits = exponent - 1 if mantissa == 0.5 else exponent
    return 62 - ceil_log2(capacity.max_updates) - ceil_log2(capacity.max_weight) - abs_bits


class WeightedMean(Plugin):
    """Σ wᵢ xᵢ / Σ wᵢ, where x is 0 for what a client of a lower rank than others has not trained."""

    name: ClassVar[str] = "weighted-mean"
    traits: ClassVar[RuleTraits] = RuleTraits(shape="fold", streams=True, exact=True, needs_all=False)

    over: Literal["all", "contributors"] = Field(
        default="all", description="Whose weights divide what clients of a lower rank have not trained."
    )

    def open(self, num_values: int, capacity: Capacity) -> Fold:
        """See `Rule.open`. The fold takes 8 bytes a value and two small buffers."""
        return FixedPointFold(num_values, capacity)


def to_grid(values: Any, scale: float) -> Any:
    """Return float32 values times `scale` as the nearest integers, int64; multiplied in float64.

    What is not an int64 becomes some number: an entry of a book that no value has may be anything.
    """
    with np.errstate(invalid="ignore"):
        return np.rint(np.multiply(values, scale, dtype=np.float64)).astype(np.int64)


class FixedPointFold:
    """The running sums of `WeightedMean`; see `Fold` for the contract.

    −0.0 adds nothing, so a mean of negative zeros is +0.0. A value's error is at most 2^−(s+1) / w from the
    grid, and the mean is divided in float64 and rounded once to float32.
    """

    def __init__(self, num_values: int, capacity: Capacity) -> None:
        if num_values < 1:
            raise ValueError(f"fold of {num_values} values: at least 1")
        self._capacity = capacity
        self._scale_bits = scale_bits(capacity)
        self._sums_D = np.zeros(num_values, dtype=np.int64)
        self._scaled = np.empty(min(CHUNK_VALUES, num_values), dtype=np.float64)
        self._addend = np.empty(self._scaled.size, dtype=np.int64)
        self._num_updates = 0
        self._total_weight = 0
        self._broken = False

    @property
    def num_updates(self) -> int:
        """See `Fold.num_updates`."""
        return self._num_updates

    @property
    def total_weight(self) -> int:
        """See `Fold.total_weight`."""
        return self._total_weight

    def add(self, parts: Iterable[Part], weight: int) -> None:
        """See `Fold.add`."""
        self._check_whole()
        if not 1 <= weight <= self._capacity.max_weight:
            raise ValueError(f"weight {weight}: from 1 to {self._capacity.max_weight}")
        if self._num_updates >= self._capacity.max_updates:
            raise ValueError(f"one more than {self._capacity.max_updates} updates")
        scale = math.ldexp(weight, self._scale_bits)
        num_values = self._sums_D.size
        start = 0
        self._broken = True
        for part in parts:
            values = part.given_n if part.book is None else part.book
            if values.ndim != 1 or values.dtype != np.float32:
                raise ValueError(f"part of {values.dtype} and shape {values.shape}, expected a float32 vector")
            if part.start != start or start + part.size > num_values:
                raise ValueError(f"values {part.start} to {part.start + part.size}, expected some from {start} on")
            sums = self._sums_D[start : start + part.size]
            if part.book is not None and part.book.size > part.given_n.size:
                self._add_part(sums, part._replace(given_n=part.values_n, book=None), scale)
            else:
                self._add_part(sums, part, scale)
            start += part.size
        if start != num_values:
            raise ValueError(f"{start} values, expected {num_values}")
        self._broken = False
        self._num_updates += 1
        self._total_weight += weight

    def clear(self) -> None:
        """See `Fold.clear`."""
        self._sums_D.fill(0)
        self._num_updates = self._total_weight = 0
        self._broken = False

    def mean_blocks(self, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """See `Fold.mean_blocks`."""
        self._check_whole()
        if self._num_updates == 0:
            raise ValueError("no updates, so no mean")
        if block_values < 1:
            raise ValueError(f"blocks of {block_values} values: at least 1")
        divisor = math.ldexp(self._total_weight, self._scale_bits)
        return (
            np.true_divide(self._sums_D[start : start + block_values], divisor).astype(np.float32)
            for start in range(0, self._sums_D.size, block_values)
        )

    def _check_whole(self) -> None:
        if self._broken:
            raise ValueError("the fold is broken: it holds a part of an update")

    def _add_part(self, sums: npt.NDArray[np.int64], part: Part, scale: float) -> None:
        if part.positions_n is not None:
            self._add_scattered(sums, part, scale)
        elif part.book is not None:
            self._add_codes(sums, part.given_n, to_grid(part.book, scale))
        else:
            self._add_block(sums, part.given_n, scale)

    def _add_scattered(self, sums: npt.NDArray[np.int64], part: Part, scale: float) -> None:
        assert part.positions_n is not None
        # If no value is left to it, it may be anything.
        rest = to_grid(np.float32(part.rest), scale) if part.given_n.size < part.size else 0
        book = None if part.book is None else to_grid(part.book, scale)
        if rest:
            sums += rest
        for start in range(0, part.given_n.size, CHUNK_VALUES):
            given = part.given_n[start : start + CHUNK_VALUES]
            addend = to_grid(given, scale) if book is None else book[given]
            # No position occurs twice, so this adds each.
            sums[part.positions_n[start : start + CHUNK_VALUES]] += addend - rest

    def _add_codes(
        self, sums: npt.NDArray[np.int64], codes: npt.NDArray[np.unsignedinteger[Any]], book: npt.NDArray[np.int64]
    ) -> None:
        for start in range(0, codes.size, CHUNK_VALUES):
            chunk = codes[start : start + CHUNK_VALUES]
            addend = self._addend[: chunk.size]
            # Codes are below the book's length; "clip" only spares a second look.
            np.take(book, chunk, out=addend, mode="clip")
            sums[start : start + chunk.size] += addend

    def _add_block(self, sums: npt.NDArray[np.int64], block: Vector, scale: float) -> None:
        for start in range(0, block.size, CHUNK_VALUES):
            chunk = block[start : start + CHUNK_VALUES]
            scaled = self._scaled[: chunk.size]
            addend = self._addend[: chunk.size]
            # In float64: 24 bits of value times up to 31 of weight, times a power of two.
            np.multiply(chunk, scale, out=scaled, dtype=np.float64)
            np.rint(scaled, out=scaled)
            np.copyto(addend, scaled, casting="unsafe")
            sums[start : start + chunk.size] += addend
