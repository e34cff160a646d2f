"""A sign for each value: with one scale for all that are kept, as in ComPEFT, or as a vote, as in HideNseek."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import numpy as np
from pydantic import Field

from fedcodec.base import Coded, Codes, Decoded, Kind, Traits, TraitsByParameters
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.errors import FrameError
from fedcore.layout import Vector
from fedcore.plugin import Plugin

_LARGEST: Final = float(np.finfo(np.float32).max)
_NAN_BYTES: Final = bytes.fromhex("0000c07f")


class _Signs(Plugin):
    """Code 1 for values below zero, 0 for all others: zeros of either sign, and NaNs."""

    kind: ClassVar[Kind] = "quantise"
    drops: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`."""
        return 2

    def decode(self, codes: Codes, table: float, start: int) -> Decoded:
        """See `Quantiser.decode`.

        Raises:
            FrameError: the scale is 0 or NaN, and a code is not 0.
        """
        if not table > 0 and codes.any():
            raise FrameError(f"a sign at scale {table}")
        return Decoded(codes, np.array([table, -table], dtype=np.float32))

    def rest(self, table: float) -> float:
        """See `Quantiser.rest`."""
        return 0.0


class Ternary(_Signs):
    """Sign times one scale; zeros that a selector left out are the third value. Yadav et al., ComPEFT, 2023.

    The scale is the mean magnitude, which loses least, or `alpha` times the standard deviation, as in the paper. That
    is of the values and of the zeros left out; the paper takes it before anything is left out. If a value is not
    finite all values decode to NaN.
    """

    name: ClassVar[str] = "ternary"
    wire_id: ClassVar[int] = 35
    # The mean of n magnitudes takes a share of at least 1 / n from the square. With `alpha` it may add to it.
    traits: ClassVar = TraitsByParameters(
        lambda stage: Traits(contraction=stage.alpha is None, changes_sensitivity=True)
    )
    may_send_as_is: ClassVar[bool] = True

    alpha: Annotated[
        float | None,
        Field(gt=0, le=1000, description="Scale in standard deviations; without it the scale is the mean magnitude."),
    ] = None

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing."""
        scale = mean_magnitude(values_n) if self.alpha is None else self.alpha * deviation(values_n, num_zeros)
        return _coded(values_n, scale)

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 4

    def read_table(self, reader: Reader, num_values: int) -> float:
        """See `Quantiser.read_table`: the scale."""
        return _read(reader)


class Sign(_Signs):
    """One bit for each value: plus or minus `scale`. Vallapuram et al., HideNseek, 2022: a vote on every sign.

    "mean" stands for the mean magnitude, which is sent, and is NaN if a value is not finite. With a number nothing
    but the signs is sent, so a value that is not finite does not show.
    """

    name: ClassVar[str] = "sign"
    wire_id: ClassVar[int] = 36
    # The mean magnitude takes a share of at least 1 / n from the square.
    traits: ClassVar = TraitsByParameters(
        lambda stage: Traits(contraction=stage.scale == "mean", changes_sensitivity=True)
    )
    may_send_as_is: ClassVar[bool] = False  # a vote has no size

    scale: Annotated[
        Annotated[float, Field(ge=1e-30, le=1e30)] | Literal["mean"],
        Field(description='What a sign is worth, 1e-30 to 1e30; "mean": the mean magnitude, which is sent.'),
    ] = 1.0

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing."""
        if self.scale != "mean":
            return Coded((values_n < 0).view(np.uint8), b"")
        scale = mean_magnitude(values_n)
        return _coded(values_n, scale)

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 4 if self.scale == "mean" else 0

    def read_table(self, reader: Reader, num_values: int) -> float:
        """See `Quantiser.read_table`: the scale, if it is sent."""
        return _read(reader) if self.scale == "mean" else self.scale


def mean_magnitude(values_n: Vector) -> float:
    """Return the mean of |x|, 0 of none; summed in float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return float(np.abs(values_n).mean(dtype=np.float64)) if values_n.size else 0.0


def deviation(values_n: Vector, num_zeros: int) -> float:
    """Return the standard deviation of the values and so many zeros, over their number; in float64."""
    count = values_n.size + num_zeros
    if not count or not np.isfinite(values_n).all():
        return float("nan") if values_n.size else 0.0
    mean = values_n.sum(dtype=np.float64) / count
    squares = np.sum((values_n.astype(np.float64) - mean) ** 2) + num_zeros * mean**2
    return float(np.sqrt(squares / count))


def _coded(values_n: Vector, scale: float) -> Coded:
    table = np.float32(min(scale, _LARGEST)).astype("<f4") if np.isfinite(scale) else np.float32("nan")
    codes_n = (values_n < 0).view(np.uint8) if table > 0 else np.zeros(values_n.size, np.uint8)
    return Coded(codes_n, table.tobytes() if np.isfinite(scale) else _NAN_BYTES)


def _read(reader: Reader) -> float:
    data = reader.take(4, "scale")
    scale = float(np.frombuffer(data, dtype="<f4")[0])
    if data != _NAN_BYTES and (not 0 <= scale <= _LARGEST or np.signbit(scale)):
        raise FrameError(f"scale {scale}: finite and not negative")
    return scale
