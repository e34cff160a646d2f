from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from pydantic import JsonValue

from fedcodec import Pipeline, build_pipeline
from fedcodec.reader import varint
from fedcore.errors import FrameError, InvalidInput, UnknownPlugin

VALUES = np.array([1.0, -2.5, 1e-3], dtype=np.float32)


def pipeline(codec: str = "raw") -> Pipeline:
    return build_pipeline([{"codec": codec}])


def frame(codec: str = "raw") -> bytes:
    return pipeline(codec).encode(VALUES, np.random.default_rng(0))


def test_frame_decodes_to_its_values() -> None:
    np.testing.assert_array_equal(pipeline().decode(frame(), 3), VALUES)
    np.testing.assert_allclose(pipeline("bf16").decode(frame("bf16"), 3), VALUES, rtol=2**-8)


@pytest.mark.parametrize("margin", range(8))
def test_decoded_vector_is_aligned_and_shares_the_frames_memory_where_it_can(margin: int) -> None:
    buffer = np.frombuffer(bytes(margin) + frame(), dtype=np.uint8)
    decoded = pipeline().decode(buffer[margin:].data, 3)
    np.testing.assert_array_equal(decoded, VALUES)
    assert decoded.flags.aligned
    is_aligned = (buffer.ctypes.data + margin + 7) % 4 == 0
    assert np.shares_memory(decoded, buffer) == is_aligned


def test_frame_may_be_a_view_into_a_larger_buffer() -> None:
    buffer = memoryview(b"before" + frame() + b"after")
    np.testing.assert_array_equal(pipeline().decode(buffer[6:-5], 3), VALUES)


def test_frame_is_as_long_as_the_bound_says_for_fixed_size_codecs() -> None:
    assert len(frame()) == pipeline().max_frame_bytes(3) == 7 + 12
    assert len(frame("bf16")) == pipeline("bf16").max_frame_bytes(3) == 7 + 6


def test_pipeline_reports_stages_that_build_it_again() -> None:
    assert pipeline("bf16").as_json() == [{"codec": "bf16"}]
    assert build_pipeline(pipeline("bf16").as_json()) == pipeline("bf16")
    assert pipeline("bf16").wire_ids == (2,)


def test_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(UnknownPlugin, match=r"unknown codec 'bf-16': did you mean 'bf16'\? known: .*bf16.*raw"):
        build_pipeline([{"codec": "bf-16"}])


@pytest.mark.parametrize("stage", [{}, {"name": "raw"}, {"codec": 7}, {"codec": None}])
def test_stage_without_a_codec_is_refused(stage: dict[str, JsonValue]) -> None:
    with pytest.raises(InvalidInput, match="a stage names its codec"):
        build_pipeline([stage])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "at least one stage"),
        (["raw", "bf16"], "bf16 turns values into codes, so it cannot follow raw, which turns values into codes"),
        (["bf16", "top-k"], "top-k selects values, so it cannot follow bf16, which turns values into codes"),
        (["fixed-symbols", "raw"], "raw turns values into codes, so it cannot follow fixed-symbols"),
        (["raw", "fixed-positions"], "fixed-positions writes positions, and no stage before it leaves anything out"),
    ],
)
def test_stages_that_do_not_compose_are_refused_with_a_sentence(names: list[str], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        build_pipeline([{"codec": name} for name in names])


def test_what_makes_a_tensor_longer_is_not_done_to_it() -> None:
    small = build_pipeline([{"codec": "per-tensor"}, {"codec": "top-k", "fraction": 1.0}])
    sizes = (10, 0, 3)
    values = np.arange(13, dtype=np.float32)
    frame = small.encode(values, np.random.default_rng(0), sizes)
    assert len(frame) == 8 + 2 + values.nbytes
    np.testing.assert_array_equal(small.decode(frame, sizes), values)


def test_a_tensor_has_one_of_two_modes_and_is_no_longer_than_as_it_is() -> None:
    pipeline = build_pipeline([{"codec": "per-tensor"}, {"codec": "top-k", "fraction": 1.0}])
    frame = pipeline.encode(np.arange(2, dtype=np.float32), np.random.default_rng(0), (1, 1))
    head, values = frame[:-10], frame[-10:]
    assert values[0] == values[5] == 1
    for mode in (2, 255):
        with pytest.raises(FrameError, match=f"mode {mode} of a tensor: 0 or 1"):
            pipeline.decode(head + bytes([mode]) + values[1:], (1, 1))
    # One of one value, coded: its count is one byte more than the value takes.
    coded = bytes([0, 1]) + values[1:5]
    with pytest.raises(FrameError, match="a tensor of 1 values in 5 bytes"):
        pipeline.decode(head + coded + bytes([0, 0]), (1, 1))


def test_what_is_left_out_is_not_built() -> None:
    sparse = build_pipeline([{"codec": "top-k", "fraction": 0.001}])
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    frame = sparse.encode(values, np.random.default_rng(0))
    tracemalloc.start()
    try:
        (part,) = sparse.open(frame, values.size)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert part.values_n.size == 1049
    assert peak_bytes < values.nbytes / 10


def test_frame_of_another_codec_is_refused() -> None:
    with pytest.raises(FrameError, match=r"stages \[2\], expected \[1\]"):
        pipeline("raw").open(frame("bf16"), 3)


def test_frame_of_another_number_of_values_is_refused() -> None:
    with pytest.raises(FrameError, match="3 values, expected 4"):
        pipeline().open(frame(), 4)


def test_every_cut_and_any_extra_byte_is_refused() -> None:
    for codec in ("raw", "bf16"):
        whole = frame(codec)
        for wrong in [*(whole[:size] for size in range(len(whole))), whole + b"\0"]:
            with pytest.raises(FrameError):
                list(pipeline(codec).open(wrong, 3))


@pytest.mark.parametrize("num_stages", [0, 2, 17, 255])
def test_header_with_another_number_of_stages_is_refused(num_stages: int) -> None:
    wrong = b"RTF1" + varint(num_stages) + b"\1" * num_stages + varint(3) + VALUES.tobytes()
    with pytest.raises(FrameError):
        pipeline().open(wrong, 3)


def test_frame_without_the_magic_is_refused() -> None:
    with pytest.raises(FrameError, match="starts with b'RTF1', this one with b'RTF2'"):
        pipeline().open(b"RTF2" + frame()[4:], 3)


def test_declared_size_costs_no_memory_before_it_is_checked() -> None:
    huge = 1 << 36
    hostile = b"RTF1\1\1" + varint(huge) + b"\0" * 100
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            pipeline().decode(hostile, huge)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


@pytest.mark.parametrize(
    "values", [np.zeros(3), np.zeros((1, 3), np.float32), np.zeros(0, np.float32), np.float32(1) * np.ones(())]
)
def test_only_float32_vectors_are_encoded(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    with pytest.raises(ValueError, match=r"float32|0 values"):
        pipeline().encode(values, np.random.default_rng(0))
