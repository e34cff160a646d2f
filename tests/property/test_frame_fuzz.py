"""Whatever bytes a peer sends as a frame, the answer is values or FrameError."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import CODECS, Pipeline
from fedcore.errors import FrameError
from fedcore.layout import Vector
from tests.support.pipelines import shortest

pytestmark = pytest.mark.parametrize("name", CODECS.names())


def attempt(pipeline: Pipeline, frame: bytes, num_values: int) -> Vector | None:
    try:
        decoded = pipeline.decode(frame, num_values)
    except FrameError:
        return None
    assert decoded.shape == (num_values,)
    return decoded


@given(frame=st.binary(max_size=100) | st.binary(max_size=100).map(b"RTF1".__add__), num_values=st.integers(1, 40))
def test_random_bytes_give_values_or_a_frame_error(name: str, frame: bytes, num_values: int) -> None:
    attempt(shortest(name), frame, num_values)


@given(
    bits=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=40),
    position=st.integers(0, 1000),
    change=st.integers(1, 255),
)
def test_one_changed_byte_gives_values_or_a_frame_error(name: str, bits: list[int], position: int, change: int) -> None:
    pipeline = shortest(name)
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    frame = bytearray(pipeline.encode(values, np.random.default_rng(0)))
    at = position % len(frame)
    frame[at] ^= change
    decoded = attempt(pipeline, bytes(frame), values.size)
    # Every byte of the header means something.
    assert decoded is None or at >= len(pipeline.wire_ids) + 6
