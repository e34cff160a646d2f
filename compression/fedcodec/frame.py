"""The bytes around a payload: what a frame says of itself. README.md has the format."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from fedcore.errors import FrameError
from fedcore.layout import MAX_VALUES

MAGIC: Final = b"RTF1"
MAX_STAGES: Final = 16
MAX_WIRE_ID: Final = 0xFFFF


def header_bytes(num_stages: int) -> int:
    """Return the length of a header with so many stages."""
    return len(MAGIC) + 1 + 2 * num_stages + 8


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
    return struct.pack(f"<4sB{len(wire_ids)}HQ", MAGIC, len(wire_ids), *wire_ids, num_values)


def open_frame(frame: bytes | memoryview, wire_ids: Sequence[int], num_values: int) -> memoryview:
    """Return the payload of a frame that was written by these stages for so many values.

    Raises:
        FrameError: it is too short, does not start with the magic, or says other stages or another number
            of values.
    """
    view = memoryview(frame)
    fixed = len(MAGIC) + 1
    if view.nbytes < fixed or bytes(view[: len(MAGIC)]) != MAGIC:
        raise FrameError(f"a frame starts with {MAGIC!r}, this one with {bytes(view[: len(MAGIC)])!r}")
    num_stages = view[len(MAGIC)]
    if not 1 <= num_stages <= MAX_STAGES:
        raise FrameError(f"frame of {num_stages} stages: 1 to {MAX_STAGES}")
    end = header_bytes(num_stages)
    if view.nbytes < end:
        raise FrameError(f"frame of {view.nbytes} bytes: its header alone has {end}")
    *found, found_values = struct.unpack(f"<{num_stages}HQ", view[fixed:end])
    if found != list(wire_ids):
        raise FrameError(f"frame with stages {found}, expected {list(wire_ids)}")
    if found_values != num_values:
        raise FrameError(f"frame of {found_values} values, expected {num_values}")
    return view[end:]


def check_payload_bytes(codec: str, payload: memoryview, expected: int) -> None:
    """Check the payload of a codec whose length follows from the number of values.

    Raises:
        FrameError: it is shorter or longer.
    """
    if payload.nbytes != expected:
        raise FrameError(f"{codec} payload of {payload.nbytes} bytes, expected {expected}")
