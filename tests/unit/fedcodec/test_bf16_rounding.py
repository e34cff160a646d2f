"""bfloat16 against torch's cast, which is an implementation of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import build_pipeline


def ours(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    pipeline = build_pipeline([{"codec": "bf16"}])
    frame = pipeline.encode(bits.view(np.float32), np.random.default_rng(0))
    return pipeline.decode(frame, bits.size).view(np.uint32)


def theirs(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    cast = torch.from_numpy(bits.view(np.float32).copy()).to(torch.bfloat16).to(torch.float32)
    result: npt.NDArray[np.uint32] = cast.numpy().view(np.uint32)
    return result


def assert_same(bits: npt.NDArray[np.uint32]) -> None:
    nan = np.isnan(bits.view(np.float32))
    found, expected = ours(bits), theirs(bits)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    # Which NaN it is differs between torch's own code paths; that it is one does not.
    assert np.isnan(found[nan].view(np.float32)).all()
    np.testing.assert_array_equal(found[nan] >> 31, bits[nan] >> 31)


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_any_bits_round_as_torch_rounds_them(patterns: list[int]) -> None:
    assert_same(np.array(patterns, dtype=np.uint32))


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_rounding_again_changes_nothing(patterns: list[int]) -> None:
    once = ours(np.array(patterns, dtype=np.uint32))
    np.testing.assert_array_equal(ours(once), once)


def test_every_upper_half_rounds_as_in_torch_around_the_tie() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        assert_same(upper | np.uint32(lower))


def test_vectors_longer_than_a_block_round_as_in_torch() -> None:
    assert_same(np.random.default_rng(5).integers(0, 1 << 32, size=(1 << 19) + 3, dtype=np.uint32))


def test_float_values_of_a_strided_view_are_encoded_in_order() -> None:
    values = np.arange(10, dtype=np.float32)
    for codec in ("raw", "bf16"):
        pipeline = build_pipeline([{"codec": codec}])
        frame = pipeline.encode(values[::2], np.random.default_rng(0))
        np.testing.assert_array_equal(pipeline.decode(frame, 5), [0, 2, 4, 6, 8])
