"""The contract of a stage: one step of a pipeline from values to bytes and back.

An update of D values goes through at most five steps, each a stage of its own kind, in this order:

    values ──clip, noise──▶ values ──select──▶ values at some positions ──quantise──▶ codes ──┬─ position coding ─┐
                                                                      └─ symbol coding ───┴──▶ bytes ──compress──▶ bytes

What a job leaves out is done in the plainest way: every position, float32, positions and codes of fixed width, no
compression. `Pipeline` puts the steps together; a stage does not know what stands beside it.

Shape legend: D values in the vector (or in one tensor of it), n of them selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.layout import Vector

BLOCK_VALUES: Final = 1 << 18
"""Values in a decoded block unless the caller says otherwise: 1 MiB of float32."""

Codes = npt.NDArray[Any]
"""Unsigned integers: uint8, uint16 or uint32."""
Positions = npt.NDArray[np.signedinteger[Any]]
"""Ascending, each once, from 0 to D − 1; decoded ones as `position_type` says."""

Kind = Literal["clip", "noise", "split", "select", "quantise", "positions", "symbols", "compress"]
KINDS: Final[tuple[Kind, ...]] = ("clip", "noise", "split", "select", "quantise", "positions", "symbols", "compress")
"""In the order in which an encoder applies them."""


@dataclass(frozen=True)
class Traits:
    """What a stage is, for the check of a whole job before it starts. C(x) is what x decodes to.

    A pipeline is lossless, unbiased or a contraction if each of its stages is; it changes the sensitivity if any does.

    Attributes:
        lossless: C(x) has the bits of x, for every x.
        unbiased: E[C(x)] = x over the codec's randomness, for every finite x, within the clip if there is one. Lossless
            implies it.
        contraction: E‖C(x) − x‖² ≤ (1 − δ)‖x‖² for some δ > 0 and every x whose values are zero or of
            magnitude 2^-126 to 2^127: what error feedback needs to converge (Stich, Cordonnier, Jaggi:
            Sparsified SGD with Memory, 2018, definition 2.1). Lossless implies it.
        integer_sum: codes are integers whose sum over clients decodes to the sum of the values.
        changes_sensitivity: ‖C(x)‖ may exceed ‖x‖, or C is not a function of one client's x alone, so a
            privacy mechanism that clipped before this codec must have added its noise before it too.
        private_draws: what it hides it hides by what it draws, so nobody else may be able to draw the same.
        votes: it decodes to ranks, which only a rule that counts votes may add.
    """

    lossless: bool = False
    unbiased: bool = False
    contraction: bool = False
    integer_sum: bool = False
    changes_sensitivity: bool = False
    private_draws: bool = False
    votes: bool = False


LOSSLESS: Final = Traits(lossless=True, unbiased=True, contraction=True)


class Stage(Protocol):
    """A stage with its parameters; derive from `fedcore.plugin.Plugin` to get `configure` and `params`.

    Pure: no state between calls, all randomness from `rng`, so the same values, parameters and generator
    state give the same bytes on every machine. Instances may be shared between threads.

    Attributes:
        name: what a job file calls it.
        wire_id: what a frame calls it, 1 to 65535, for ever: bytes written under an id decode under it in
            every later release, golden vectors in tests/golden say so. Ids from 32768 are for third
            parties.
        kind: which step it is.
        traits: what it promises; see `TraitsByParameters`.
    """

    name: ClassVar[str]
    wire_id: ClassVar[int]
    kind: ClassVar[Kind]
    traits: ClassVar[Traits]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the stage with these parameters.

        Raises:
            InvalidInput: a parameter is unknown (the nearest known one is named), missing or out of bounds.
        """
        ...

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter; `configure` takes them back.

        Parameters do not travel in frames: both sides know them from the job.
        """
        ...


class Transform(Stage, Protocol):
    """Changes a vector as a whole, before the others; decoding does not undo it."""

    def apply(self, values_D: Vector, rng: Draws) -> Vector:
        """Return what is encoded instead of D ≥ 1 values, which are not changed."""
        ...


class Selected(NamedTuple):
    """What a selector keeps; `values_n` are those at `positions_n`, perhaps scaled."""

    positions_n: Positions
    values_n: Vector
    note: bytes
    """What a decoder finds the positions by; empty if they are to be sent."""


class Selector(Stage, Protocol):
    """Keeps some of the values; the others decode to zero."""

    note_bytes: ClassVar[int]
    """Length of `Selected.note`; 0 if positions are sent."""

    def select(self, values_D: Vector, rng: Draws) -> Selected:
        """Return what is kept of D ≥ 1 values, which are not changed."""
        ...

    def max_selected(self, num_values: int) -> int:
        """Return how many of so many values are kept at most."""
        ...

    def positions(self, note: bytes, num_values: int) -> Positions:
        """Return the positions by the note; only for selectors that write one."""
        ...


class Coded(NamedTuple):
    """Values as codes.

    Attributes:
        codes_n: one for each value.
        table: what is needed to decode them, such as centroids or scales.
        keep_n: indices of the values that the codes are of; None: all. The others decode to `Quantiser.rest`.
    """

    codes_n: Codes
    table: bytes
    keep_n: Positions | None = None


class Decoded(NamedTuple):
    """What codes stand for.

    Attributes:
        given_n: values, or with a book the codes themselves.
        book: the value of each code, if it is the same at every place.
    """

    given_n: Vector | Codes
    book: Vector | None = None

    @property
    def values_n(self) -> Vector:
        """The values."""
        return self.given_n if self.book is None else self.book[self.given_n]


class Quantiser(Stage, Protocol):
    """Turns values into codes from a finite set, at the price of some of their bits."""

    drops: ClassVar[bool]
    """Whether some codes are not sent, see `Coded.keep_n`."""
    may_send_as_is: ClassVar[bool]
    """Whether a tensor that gets longer by it may be sent as float32: not if codes hide something."""
    streams: ClassVar[bool]
    """Whether codes may be decoded in several calls, from the first on; else all of a tensor's are in one."""

    def num_codes(self, num_values: int) -> int:
        """Return how many different codes there are for so many values: they are 0 to that − 1."""
        ...

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """Return n ≥ 0 values as codes, in the smallest unsigned type that holds `num_codes(n) − 1`.

        Args:
            values_n: what to encode; not changed.
            num_zeros: how many zeros were left out before.
            rng: of whatever it draws.
        """
        ...

    def max_table_bytes(self, num_values: int) -> int:
        """Return a bound on the table for so many values; its very length if nothing is dropped."""
        ...

    def read_table(self, reader: Reader, num_values: int) -> Any:
        """Return the table for so many values, checked; whatever `decode` takes.

        Raises:
            FrameError: it is cut short, or holds what `encode` does not write.
        """
        ...

    def decode(self, codes: Codes, table: Any, start: int) -> Decoded:
        """Return the values of codes below `num_codes(n)`, which are those from the `start`-th on.

        Raises:
            FrameError: `encode` does not write these codes with this table.
        """
        ...

    def rest(self, table: Any) -> float:
        """Return the value of whatever is not sent."""
        ...


class PositionCoder(Stage, Protocol):
    """Writes ascending positions."""

    def encode(self, positions_n: Positions, size: int) -> bytes:
        """Return n positions below `size` as bytes that tell where they end, n being known."""
        ...

    def max_bytes(self, count: int, size: int) -> int:
        """Return a bound on what `encode` returns."""
        ...

    def decode(self, reader: Reader, count: int, size: int) -> Positions:
        """Read them; `count` is at most `size`.

        Raises:
            FrameError: they are cut short, not ascending, not below `size`, or not as `encode` writes them.
        """
        ...


class SymbolCoder(Stage, Protocol):
    """Writes codes."""

    max_codes: ClassVar[int]
    """How many different codes it can write."""
    streams: ClassVar[bool]
    """Whether codes that were written together may be read in several calls, each but the last of a multiple of 8."""

    def encode(self, codes_n: Codes, num_codes: int) -> bytes | memoryview:
        """Return n codes below `num_codes` as bytes that tell where they end, n being known."""
        ...

    def max_bytes(self, count: int, num_codes: int) -> int:
        """Return a bound on what `encode` returns."""
        ...

    def decode(self, reader: Reader, count: int, num_codes: int) -> Codes:
        """Read them.

        Raises:
            FrameError: they are cut short, one is not below `num_codes`, or they are not as `encode` writes them.
        """
        ...


class Compressor(Stage, Protocol):
    """Bytes to fewer bytes."""

    def compress(self, data: bytes | memoryview) -> bytes:
        """Return them compressed."""
        ...

    def max_bytes(self, num_bytes: int) -> int:
        """Return a bound on what `compress` returns for so many bytes."""
        ...

    def decompress(self, data: memoryview, max_bytes: int) -> bytes | memoryview:
        """Return what was compressed.

        Raises:
            FrameError: it is not what `compress` writes, or more than `max_bytes`; no more than that is allocated.
        """
        ...


class TraitsByParameters:
    """Traits that depend on a stage's parameters. Asked of the class they are those with the defaults."""

    def __init__(self, traits: Callable[[Any], Traits]) -> None:
        self._traits = traits

    def __get__(self, stage: Any, owner: type[Any]) -> Traits:
        """Return the traits of a stage."""
        return self._traits(owner.configure({}) if stage is None else stage)


def code_type(num_codes: int) -> type[np.uint8] | type[np.uint16] | type[np.uint32]:
    """Return the smallest unsigned type that holds `num_codes` − 1."""
    return np.uint8 if num_codes <= 1 << 8 else np.uint16 if num_codes <= 1 << 16 else np.uint32


def position_type(size: int) -> type[np.int32] | type[np.int64]:
    """Return the smaller type that holds positions below `size`: of all that a frame decodes to they take most."""
    return np.int32 if size < 1 << 31 else np.int64
