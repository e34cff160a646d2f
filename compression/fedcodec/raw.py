"""The values themselves: float32, little-endian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from fedcodec.base import BLOCK_VALUES, Traits
from fedcodec.frame import check_payload_bytes
from fedcore.layout import Vector
from fedcore.plugin import Plugin


class Raw(Plugin):
    """IEEE 754 binary32, little-endian, four bytes a value; NaN payloads and signed zeros survive."""

    name: ClassVar[str] = "raw"
    wire_id: ClassVar[int] = 1
    traits: ClassVar[Traits] = Traits(
        lossless=True,
        unbiased=True,
        contraction=True,
        integer_sum=False,
        changes_sensitivity=False,
        streams=True,
    )

    def encode(self, values_D: Vector, rng: np.random.Generator) -> memoryview:
        """See `Codec.encode`; draws nothing."""
        return np.ascontiguousarray(values_D, dtype="<f4").view(np.uint8).data

    def max_payload_bytes(self, num_values: int) -> int:
        """See `Codec.max_payload_bytes`."""
        return 4 * num_values

    def blocks(self, payload: memoryview, num_values: int, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """See `Codec.blocks`; the length is checked on the call."""
        check_payload_bytes(self.name, payload, 4 * num_values)
        values_D = np.frombuffer(payload, dtype="<f4").astype(np.float32, copy=False)
        return (values_D[start : start + block_values] for start in range(0, num_values, block_values))
