"""The order of the values without the values: a vote."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from fedcodec.base import Coded, Codes, Decoded, Kind, Traits, code_type
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector
from fedcore.plugin import Plugin

MAX_RANKED: Final = 1 << 24
"""Up to it every whole number is a float32."""

_RANKED: Final = 0
_NOT_FINITE: Final = 1


class Ranks(Plugin):
    """Replaces n values by 1 for the smallest to n for the largest; of equal ones, −0 and 0 too, the first is lower.

    Mozaffari, Shejwalkar, Houmansadr: Every Vote Counts: Ranking-Based Training of Federated Learning to Resist
    Poisoning Attacks, 2023. Codes are ranks from 0. Values are ranks from 1, so that what a selector left out, 0, is
    below all that it kept. A client's say is bounded whatever its values are: what decodes is a permutation.

    If a value is not finite all decode to NaN. A tensor has at most 2^24 values.
    """

    name: ClassVar[str] = "ranks"
    wire_id: ClassVar[int] = 39
    kind: ClassVar[Kind] = "quantise"
    traits: ClassVar[Traits] = Traits(integer_sum=True, changes_sensitivity=True, votes=True)
    drops: ClassVar[bool] = False
    may_send_as_is: ClassVar[bool] = False  # a vote has no size
    streams: ClassVar[bool] = False  # whether a rank is given twice only all of them tell

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`."""
        return max(1, num_values)

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing.

        Raises:
            InvalidInput: there are more values than can be ranked.
        """
        if values_n.size > MAX_RANKED:
            raise InvalidInput(f"ranks of {values_n.size} values of one tensor, at most {MAX_RANKED}")
        codes_n = np.zeros(values_n.size, dtype=code_type(self.num_codes(values_n.size)))
        if not np.isfinite(values_n).all():
            return Coded(codes_n, bytes([_NOT_FINITE]))
        codes_n[np.argsort(values_n, kind="stable")] = np.arange(values_n.size, dtype=codes_n.dtype)
        return Coded(codes_n, bytes([_RANKED]))

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 1

    def read_table(self, reader: Reader, num_values: int) -> int:
        """See `Quantiser.read_table`: whether the values were finite."""
        if num_values > MAX_RANKED:
            raise FrameError(f"ranks of {num_values} values of one tensor, at most {MAX_RANKED}")
        table = reader.take(1, "ranks")[0]
        if table > (_NOT_FINITE if num_values else _RANKED):
            raise FrameError(f"ranks of {num_values} values begin with {table}")
        return table

    def decode(self, codes: Codes, table: int, start: int) -> Decoded:
        """See `Quantiser.decode`.

        Raises:
            FrameError: the codes are no permutation, or those of values that are not finite are not 0.
        """
        if table == _NOT_FINITE:
            if codes.any():
                raise FrameError("a rank of values that are not finite")
            return Decoded(np.full(codes.size, np.nan, dtype=np.float32))
        is_given = np.zeros(codes.size, dtype=np.bool_)
        is_given[codes] = True
        if not is_given.all():
            raise FrameError(f"no value has rank {np.argmin(is_given)}, so another rank occurs twice")
        return Decoded(codes.astype(np.float32) + np.float32(1))

    def rest(self, table: int) -> float:
        """See `Quantiser.rest`."""
        return 0.0
