"""The contract of a codec: values → bytes → values.

A codec is a pipeline's one step from an array to bytes. Steps before it (array → array, as sparsifying) and
after it (bytes → bytes, as entropy coding) will have protocols of their own in this file, and `Pipeline`
will chain them; a codec does not know what stands beside it.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

import numpy as np
from pydantic import JsonValue

from fedcore.layout import Vector

BLOCK_VALUES: Final = 1 << 18
"""Values in a decoded block unless the caller says otherwise: 1 MiB of float32."""


@dataclass(frozen=True)
class Traits:
    """What a codec is, for the check of a whole job before it starts. C(x) is what x decodes to.

    Attributes:
        lossless: C(x) has the bits of x, for every x.
        unbiased: E[C(x)] = x over the codec's randomness, for every finite x. Lossless implies it.
        contraction: E‖C(x) − x‖² ≤ (1 − δ)‖x‖² for some δ > 0 and every x whose values are zero or of
            magnitude 2^-126 to 2^127: what error feedback needs to converge (Stich, Cordonnier, Jaggi:
            Sparsified SGD with Memory, 2018, definition 2.1). Lossless implies it.
        integer_sum: payloads hold integers whose sum over clients decodes to the sum of the values.
        changes_sensitivity: ‖C(x)‖ may exceed ‖x‖, or C is not a function of one client's x alone, so a
            privacy mechanism that clipped before this codec must have added its noise before it too.
        streams: `Codec.blocks` needs memory for one block only, beyond the payload.
    """

    lossless: bool
    unbiased: bool
    contraction: bool
    integer_sum: bool
    changes_sensitivity: bool
    streams: bool


class Codec(Protocol):
    """A codec with its parameters; derive from `fedcore.plugin.Plugin` to get `configure` and `params`.

    Pure: no state between calls, all randomness from `rng`, so the same values, parameters and generator
    state give the same bytes on every machine. Instances may be shared between threads.

    Attributes:
        name: what a job file calls it.
        wire_id: what a frame calls it, 1 to 65535, for ever: bytes written under an id decode under it in
            every later release, golden vectors in tests/golden say so. Ids from 32768 are for third
            parties.
        traits: what it promises.
    """

    name: ClassVar[str]
    wire_id: ClassVar[int]
    traits: ClassVar[Traits]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the codec with these parameters.

        Raises:
            InvalidInput: a parameter is unknown (the nearest known one is named), missing or out of bounds.
        """
        ...

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter; `configure` takes them back.

        Parameters do not travel in frames: both sides know them from the job.
        """
        ...

    def encode(self, values_D: Vector, rng: np.random.Generator) -> bytes | memoryview:
        """Return the payload of D ≥ 1 values. It may share memory with `values_D`, which is not changed."""
        ...

    def max_payload_bytes(self, num_values: int) -> int:
        """Return a bound on what `encode` returns for so many values. A longer payload is refused unread."""
        ...

    def blocks(self, payload: memoryview, num_values: int, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """Decode, in order, into float32 blocks of `block_values` values, the last one shorter.

        The blocks hold `num_values` values in all. `payload` is hostile; every length in it is checked before
        anything is allocated by it, and it must be used up exactly. A block may be a read-only view of the
        payload; the codec does not write to it once it is handed out.

        Raises:
            FrameError: on the call or on any step, if the payload is not what `encode` writes for
                `num_values`.
        """
        ...
