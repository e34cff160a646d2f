"""The stages of a job put together, and the frames that they write and read.

Shape legend: D values in the vector, n of them selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import JsonValue

from fedcodec.base import (
    BLOCK_VALUES,
    Compressor,
    PositionCoder,
    Quantiser,
    Selector,
    Stage,
    SymbolCoder,
    Traits,
    Transform,
)
from fedcodec.coders.fixed import FixedSymbols
from fedcodec.frame import open_frame, pack_header
from fedcodec.reader import Reader, varint
from fedcore.draws import Draws
from fedcore.errors import FrameError
from fedcore.layout import Vector
from fedcore.part import Part

AS_IS: Final = 1
"""First byte of a tensor that the stages would have made longer: its values follow as float32."""
CODED: Final = 0
MAX_COUNT_BYTES: Final = 6

Sizes = Sequence[int] | int
"""How many values each tensor of a layout has; a number: there is one tensor."""


@dataclass(frozen=True)
class Pipeline:
    """What turns a vector into a frame and back, pure and shareable between threads as its stages are.

    Attributes:
        stages: as the job names them; a frame bears their ids.
        quantise: float32 unless the job names another.
        positions: how positions are written, where they are.
        symbols: how codes are written.
        transforms: what is done to the whole vector first.
        select: what is kept; None: all.
        compress: what makes the payload shorter in the end; None: nothing.
        by_tensor: whether each tensor goes through the stages by itself.
    """

    stages: tuple[Stage, ...]
    quantise: Quantiser
    positions: PositionCoder
    symbols: SymbolCoder
    transforms: tuple[Transform, ...] = ()
    select: Selector | None = None
    compress: Compressor | None = None
    by_tensor: bool = False

    @property
    def wire_ids(self) -> tuple[int, ...]:
        """The stages as a frame names them, in the order of encoding."""
        return tuple(stage.wire_id for stage in self.stages)

    @property
    def traits(self) -> Traits:
        """What the stages promise together."""
        traits = [stage.traits for stage in self.stages]
        return Traits(
            lossless=all(each.lossless for each in traits),
            unbiased=all(each.unbiased for each in traits),
            contraction=all(each.contraction for each in traits),
            integer_sum=self.quantise.traits.integer_sum,
            changes_sensitivity=any(each.changes_sensitivity for each in traits),
            private_draws=any(each.private_draws for each in traits),
            votes=self.quantise.traits.votes,
        )

    @property
    def is_sparse(self) -> bool:
        """Whether frames hold positions."""
        return self.quantise.drops or (self.select is not None and self.select.note_bytes == 0)

    @property
    def streams(self) -> bool:
        """Whether decoding needs memory for one block only, beyond the frame."""
        streams = self.quantise.streams and self.symbols.streams
        return streams and not (self.is_sparse or self.select or self.by_tensor or self.compress)

    @property
    def fixed_size(self) -> bool:
        """Whether every frame has `max_frame_bytes`, whatever the values."""
        return isinstance(self.symbols, FixedSymbols) and not self.is_sparse and self.compress is None

    def as_json(self) -> list[dict[str, JsonValue]]:
        """Return the stages with every parameter, defaults included; `build_pipeline` takes them back."""
        return [{"codec": stage.name, **stage.params()} for stage in self.stages]

    # Encoding.

    def encode(self, values_D: Vector, rng: Draws, sizes: Sizes | None = None) -> bytes:
        """Return a whole frame; raises like `parts`."""
        return b"".join(self.parts(values_D, rng, sizes))

    def parts(self, values_D: Vector, rng: Draws, sizes: Sizes | None = None) -> list[bytes | memoryview]:
        """Return a whole frame in pieces, the header first, for who would rather not hold it twice.

        Args:
            values_D: what to encode; not changed, perhaps shared.
            rng: of whatever the stages draw.
            sizes: of the layout's tensors, D together; None: there is one.

        Raises:
            ValueError: `values_D` is not a vector of at least one float32, or `sizes` are of another one.
        """
        sizes = values_D.size if sizes is None else sizes
        num_values = _total(sizes)
        if values_D.ndim != 1 or values_D.dtype != np.float32 or values_D.size != num_values or num_values < 1:
            raise ValueError(f"{values_D.dtype} of shape {values_D.shape}, expected {num_values} float32, at least 1")
        for transform in self.transforms:
            values_D = transform.apply(values_D, rng)
        payload: list[bytes | memoryview] = []
        start = 0
        for size in self._segments(sizes):
            tensor = np.ascontiguousarray(values_D[start : start + size])
            payload += self._encode_tensor(tensor, rng) if self.by_tensor else self._encode(tensor, rng)
            start += size
        header = pack_header(self.wire_ids, values_D.size)
        return [header, *payload] if self.compress is None else [header, self.compress.compress(b"".join(payload))]

    def _segments(self, sizes: Sizes) -> list[int]:
        if self.by_tensor and not isinstance(sizes, int):
            return [size for size in sizes if size]
        return [_total(sizes)]

    def _encode_tensor(self, values_D: Vector, rng: Draws) -> list[bytes | memoryview]:
        coded = self._encode(values_D, rng)
        if self.quantise.may_send_as_is and sum(map(len, coded)) > values_D.nbytes:
            return [bytes([AS_IS]), values_D.astype("<f4", copy=False).data.cast("B")]
        return [bytes([CODED]), *coded]

    def _encode(self, values_D: Vector, rng: Draws) -> list[bytes | memoryview]:
        """Return note, count, table, positions, codes: those of them that there are."""
        found: list[bytes | memoryview] = []
        positions_n, values_n = None, values_D
        if self.select is not None:
            positions_n, values_n, note = self.select.select(values_D, rng)
            found.append(note)
        num_zeros = values_D.size - values_n.size
        coded = self.quantise.encode(values_n, num_zeros, rng)
        if self.is_sparse:
            if coded.keep_n is not None:
                positions_n = coded.keep_n if positions_n is None else positions_n[coded.keep_n]
            assert positions_n is not None
            found += [varint(positions_n.size), coded.table, self.positions.encode(positions_n, values_D.size)]
        else:
            found.append(coded.table)
        found.append(self.symbols.encode(coded.codes_n, self.quantise.num_codes(values_n.size)))
        return found

    # Bounds.

    def max_frame_bytes(self, sizes: Sizes) -> int:
        """Return a bound on the frames of such a layout; a peer that announces more is refused unread."""
        return len(pack_header(self.wire_ids, _total(sizes))) + self._max_sent_bytes(sizes)

    def _max_sent_bytes(self, sizes: Sizes) -> int:
        plain = self._max_payload_bytes(sizes)
        return plain if self.compress is None else self.compress.max_bytes(plain)

    def _max_payload_bytes(self, sizes: Sizes) -> int:
        segments = self._segments(sizes)
        if self.by_tensor and self.quantise.may_send_as_is:
            return sum(1 + min(4 * size, self._max_segment_bytes(size)) for size in segments)
        return sum(self.by_tensor + self._max_segment_bytes(size) for size in segments)

    def _max_segment_bytes(self, size: int) -> int:
        count = size if self.select is None else self.select.max_selected(size)
        num_bytes = 0 if self.select is None else self.select.note_bytes
        if self.is_sparse:
            num_bytes += MAX_COUNT_BYTES + self.positions.max_bytes(count, size)
        table_bytes = self.quantise.max_table_bytes(count)
        return num_bytes + table_bytes + self.symbols.max_bytes(count, self.quantise.num_codes(count))

    # Decoding.

    def open(self, frame: bytes | memoryview, sizes: Sizes) -> Iterator[Part]:
        """Decode a hostile frame into parts, in order, D values together; see `Part` for how long each is good.

        The header and the frame's length are checked on the call. Values are what the peer wrote: NaN and infinities
        come through.

        Raises:
            FrameError: on the call or on any step, if this is not a frame of these stages and such a layout, is cut
                short, goes on after its end, or is not what `encode` writes.
        """
        reader = open_frame(frame, self.wire_ids, _total(sizes))
        limit = self._max_sent_bytes(sizes)
        if reader.left > limit:
            raise FrameError(f"payload of {reader.left} bytes, at most {limit}")
        if self.compress is not None:
            data = reader.take(reader.left, "payload")
            reader = Reader(self.compress.decompress(data, self._max_payload_bytes(sizes)))
        return self._parts(reader, sizes)

    def decode(self, frame: bytes | memoryview, sizes: Sizes) -> Vector:
        """Return all values of a hostile frame as one aligned vector; it may be a read-only view of `frame`.

        Raises:
            FrameError: see `open`.
        """
        if self.streams:
            reader = open_frame(frame, self.wire_ids, _total(sizes))
            (part,) = self._dense(reader, 0, _total(sizes), _total(sizes))
            reader.end()
            values_D = part.values_n
            return values_D if values_D.flags.aligned else values_D.copy()
        values_D = np.empty(_total(sizes), dtype=np.float32)
        for part in self.open(frame, sizes):
            values_D[part.start : part.start + part.size] = part.dense()
        return values_D

    def _parts(self, reader: Reader, sizes: Sizes) -> Iterator[Part]:
        start = 0
        for size in self._segments(sizes):
            mode = reader.take(1, "mode")[0] if self.by_tensor else CODED
            if mode != CODED:
                yield self._as_is(reader, mode, start, size)
                start += size
                continue
            before = reader.left
            if self.is_sparse or self.select is not None:
                yield self._scattered(reader, start, size)
            else:
                yield from self._dense(reader, start, size, BLOCK_VALUES)
            if self.by_tensor and self.quantise.may_send_as_is and before - reader.left > 4 * size:
                raise FrameError(f"a tensor of {size} values in {before - reader.left} bytes, as they are it has fewer")
            start += size
        reader.end()

    def _as_is(self, reader: Reader, mode: int, start: int, size: int) -> Part:
        if mode != AS_IS:
            raise FrameError(f"mode {mode} of a tensor: {CODED} or {AS_IS}")
        if not self.quantise.may_send_as_is:
            raise FrameError(f"values as they are, which {self.quantise.name} does not allow")
        return Part(start, size, None, np.frombuffer(reader.take(4 * size, "values"), dtype="<f4"))

    def _scattered(self, reader: Reader, start: int, size: int) -> Part:
        count, rest, positions_n = size, 0.0, None
        if self.select is not None:
            count = self.select.max_selected(size)
            if self.select.note_bytes:
                note = bytes(reader.take(self.select.note_bytes, self.select.name))
                positions_n = self.select.positions(note, size)
        if self.is_sparse:
            count = reader.varint(count, "number of values sent")
        table = self.quantise.read_table(reader, count)
        if self.is_sparse:
            positions_n = self.positions.decode(reader, count, size)
            rest = self.quantise.rest(table)
        codes_n = self.symbols.decode(reader, count, self.quantise.num_codes(count))
        return Part(start, size, positions_n, *self.quantise.decode(codes_n, table, 0), rest)

    def _dense(self, reader: Reader, start: int, size: int, block_values: int) -> Iterator[Part]:
        table = self.quantise.read_table(reader, size)
        num_codes = self.quantise.num_codes(size)
        codes_D = None if self.symbols.streams else self.symbols.decode(reader, size, num_codes)
        if not self.quantise.streams:
            block_values = size
        for at in range(0, size, block_values):
            count = min(block_values, size - at)
            codes = self.symbols.decode(reader, count, num_codes) if codes_D is None else codes_D[at : at + count]
            yield Part(start + at, count, None, *self.quantise.decode(codes, table, at))


def _total(sizes: Sizes) -> int:
    return sizes if isinstance(sizes, int) else sum(sizes)
