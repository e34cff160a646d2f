"""An ordered list of stages, and the frames that it writes and reads.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue

from fedcodec.base import BLOCK_VALUES, Codec
from fedcodec.frame import header_bytes, open_frame, pack_header
from fedcodec.table import CODECS
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector


@dataclass(frozen=True)
class Pipeline:
    """What turns a vector into a frame and back, pure and shareable between threads as its codec is.

    Attributes:
        codec: the step from values to bytes.
    """

    codec: Codec

    @property
    def wire_ids(self) -> tuple[int, ...]:
        """The stages as a frame names them, in the order of encoding."""
        return (self.codec.wire_id,)

    def as_json(self) -> list[dict[str, JsonValue]]:
        """Return the stages with every parameter, defaults included; `build_pipeline` takes them back."""
        return [{"codec": self.codec.name, **self.codec.params()}]

    def encode(self, values_D: Vector, rng: np.random.Generator) -> bytes:
        """Return a whole frame; raises like `parts`."""
        return b"".join(self.parts(values_D, rng))

    def parts(self, values_D: Vector, rng: np.random.Generator) -> tuple[bytes, bytes | memoryview]:
        """Return a whole frame in two pieces, header and payload, for who would rather not hold it twice.

        Raises:
            ValueError: `values_D` is not a vector of at least one float32.
        """
        if values_D.ndim != 1 or values_D.dtype != np.float32:
            raise ValueError(f"{values_D.dtype} of shape {values_D.shape}, expected a float32 vector")
        header = pack_header(self.wire_ids, values_D.size)
        return header, self.codec.encode(values_D, rng)

    def max_frame_bytes(self, num_values: int) -> int:
        """Return a bound on the frames of so many values; a peer that announces more is refused unread."""
        return header_bytes(len(self.wire_ids)) + self.codec.max_payload_bytes(num_values)

    def blocks(self, frame: bytes | memoryview, num_values: int, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """Decode a hostile frame, in order, into blocks of `block_values` values, the last one shorter.

        The header and the frame's length are checked on the call, before any block. Blocks may be read-only
        views of `frame`. Values are what the peer wrote: NaN and infinities come through.

        Raises:
            FrameError: on the call or on any step, if this is not a frame of these stages and so many
                values, is cut short, or goes on after its end.
            ValueError: `block_values` is below 1.
        """
        if block_values < 1:
            raise ValueError(f"blocks of {block_values} values: at least 1")
        payload = open_frame(frame, self.wire_ids, num_values)
        limit = self.codec.max_payload_bytes(num_values)
        if payload.nbytes > limit:
            raise FrameError(f"{self.codec.name} payload of {payload.nbytes} bytes, at most {limit}")
        return self.codec.blocks(payload, num_values, block_values)

    def decode(self, frame: bytes | memoryview, num_values: int) -> Vector:
        """Return all values of a hostile frame as one vector; it may be a read-only view of `frame`.

        Raises:
            FrameError: see `blocks`.
        """
        (values_D,) = self.blocks(frame, num_values, num_values)
        return values_D if values_D.flags.aligned else values_D.copy()


def build_pipeline(stages: Sequence[Mapping[str, JsonValue]]) -> Pipeline:
    """Return the pipeline of a job's stages, in the order of encoding.

    A stage is ``{"codec": name, parameter: value, …}``.

    Raises:
        InvalidInput: a stage names no codec, a parameter is unknown or out of bounds, or the stages do not
            compose.
        UnknownPlugin: there is no codec of that name; the text names the known ones.
    """
    codecs = [_build_stage(stage) for stage in stages]
    if len(codecs) != 1:
        names = ", ".join(codec.name for codec in codecs) or "nothing"
        raise InvalidInput(f"a pipeline turns values into bytes once: one such codec, not {len(codecs)} ({names})")
    return Pipeline(codecs[0])


def _build_stage(stage: Mapping[str, JsonValue]) -> Codec:
    name = stage.get("codec")
    if not isinstance(name, str):
        raise InvalidInput(f"a stage names its codec, known: {', '.join(CODECS.names())}; got {str(dict(stage))[:80]}")
    return CODECS.get(name).configure({key: value for key, value in stage.items() if key != "codec"})
