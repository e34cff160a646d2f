"""The bytes before a payload: what a frame says of itself. docs/wire-format.md has the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedcodec.reader import Reader, varint
from fedcore.errors import FrameError
from fedcore.layout import MAX_VALUES

MAGIC: Final = b"RTF1"
MAX_STAGES: Final = 16
MAX_WIRE_ID: Final = 0xFFFF


def pack_header(wire_ids: Sequence[int], num_values: int) -> bytes:
    """Return the header: magic, number of stages, their ids in the order of encoding, number of values.

    Raises:
        ValueError: a number is outside what a frame can say.
    """
    if not 1 <= len(wire_ids) <= MAX_STAGES:
        raise ValueError(f"{len(wire_ids)} stages: a frame has 1 to {MAX_STAGES}")
    if not all(1 <= wire_id <= MAX_WIRE_ID for wire_id in wire_ids):
        raise ValueError(f"wire ids {list(wire_ids)}: each from 1 to {MAX_WIRE_ID}")
    if not 1 <= num_values <= MAX_VALUES:
        raise ValueError(f"{num_values} values: a frame has 1 to {MAX_VALUES}")
    return MAGIC + b"".join(varint(number) for number in (len(wire_ids), *wire_ids, num_values))


def open_frame(frame: bytes | memoryview, wire_ids: Sequence[int], num_values: int) -> Reader:
    """Return the payload of a frame that was written by these stages for so many values.

    Raises:
        FrameError: it is too short, does not start with the magic, or says other stages or another number
            of values.
    """
    reader = Reader(frame)
    magic = bytes(reader.take(min(len(MAGIC), reader.left), "magic"))
    if magic != MAGIC:
        raise FrameError(f"a frame starts with {MAGIC!r}, this one with {magic!r}")
    found = [reader.varint(MAX_WIRE_ID, "stage") for _ in range(reader.varint(MAX_STAGES, "number of stages"))]
    if found != list(wire_ids):
        raise FrameError(f"frame with stages {found}, expected {list(wire_ids)}")
    found_values = reader.varint(MAX_VALUES, "number of values")
    if found_values != num_values:
        raise FrameError(f"frame of {found_values} values, expected {num_values}")
    return reader
