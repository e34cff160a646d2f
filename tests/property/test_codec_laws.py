"""Laws of stages for all vectors: what is lossless changes nothing, and what contracts does so everywhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedcodec import CODECS, Pipeline, build_pipeline
from fedcodec.build import MAX_CODED
from fedcodec.reader import Reader, varint
from fedcore.errors import FrameError
from fedcore.layout import MAX_VALUES, Vector
from tests.support.pipelines import shortest

NAMES = CODECS.names()
LOSSLESS = [name for name in NAMES if CODECS.get(name).traits.lossless]
CONTRACTING = [name for name in NAMES if CODECS.get(name).traits.contraction and name not in LOSSLESS]
ODD = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.5, 3.4028235e38, np.inf, -np.inf, np.nan]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def f32(values: list[float]) -> Vector:
    return np.array(values, dtype=np.float32)


def beside_powers_of_two() -> st.SearchStrategy[int]:
    return st.builds(lambda power, step: max(1, (1 << power) + step), st.integers(0, 11), st.sampled_from([-1, 0, 1]))


def random_bits(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)


def normal(size: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


vectors = st.one_of(
    st.builds(lambda size, value: np.full(size, value, np.float32), beside_powers_of_two(), st.sampled_from(ODD)),
    st.builds(random_bits, beside_powers_of_two(), st.integers(0, 1000)),
    st.builds(normal, beside_powers_of_two(), st.integers(0, 1000)),
    st.lists(st.sampled_from(ODD), min_size=1, max_size=40).map(f32),
)


def round_trip(pipeline: Pipeline, values: Vector) -> bytes:
    return pipeline.decode(pipeline.encode(values, rng()), values.size).tobytes()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("quantiser", ["raw", "bf16", "int8", "kmeans", "sign", "ranks"])
@given(values=vectors)
@example(values=f32([-0.0]))
@example(values=np.zeros(7, np.float32))  # of which threshold keeps none
def test_lossless_stage_changes_nothing(name: str, quantiser: str, values: Vector) -> None:
    """Whatever stands before it, a pipeline with it decodes to the bits of the pipeline without it."""
    stage = CODECS.get(name)
    if stage.kind == "quantise":
        assert round_trip(build_pipeline([{"codec": name}]), values) == values.tobytes()
        return
    if getattr(stage, "max_codes", MAX_CODED) < shortest(quantiser).quantise.num_codes(MAX_CODED):
        return
    before: list[dict[str, JsonValue]] = [{"codec": quantiser}]
    if stage.kind == "positions":
        before.insert(0, {"codec": "threshold", "value": 0.5})
    here = 0 if stage.kind == "split" else len(before)
    found = round_trip(build_pipeline([*before[:here], {"codec": name}, *before[here:]]), values)
    # A tensor by itself may go as it is.
    assert found == round_trip(build_pipeline(before), values) or (stage.kind == "split" and found == values.tobytes())


@pytest.mark.parametrize("name", NAMES)
@given(values=vectors)
def test_memory_layout_of_the_values_makes_no_difference(name: str, values: Vector) -> None:
    pipeline = shortest(name)
    frame = pipeline.encode(values, rng())
    spread = np.empty((values.size, 3), np.float32)
    spread[:, 1] = values
    unaligned = np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(np.float32)
    for view in (spread[:, 1], values[::-1].copy()[::-1], unaligned):
        assert pipeline.encode(view, rng()) == frame
    constant = np.broadcast_to(values[0], values.size)  # stride 0
    assert pipeline.encode(constant, rng()) == pipeline.encode(constant.copy(), rng())


magnitudes = st.floats(2.0**-126, 2.0**127, width=32) | st.sampled_from([2.0**-126, 1.0, 2.0**127, 0.0])
contracted = st.lists(st.builds(lambda size, sign: size * sign, magnitudes, st.sampled_from([1, -1])), min_size=1)


@pytest.mark.parametrize("name", CONTRACTING)
@given(numbers=contracted)
@example(numbers=[2.0**127] * 50)
@example(numbers=[2.0**-126] * 50)
@example(numbers=[1.0] + [2.0**-10] * 100)
@example(numbers=[1.0] + [0.25] * 255)  # what loses the most by rounding to 1, 7 and 127 levels
@example(numbers=[7.0] + [0.25] * 255)
@example(numbers=[127.0] + [0.25] * 255)
@example(numbers=[1.0, -1.0] * 20)
def test_contraction_loses_less_than_the_whole_of_any_vector(name: str, numbers: list[float]) -> None:
    values = f32(numbers)
    draws = [
        shortest(name).decode(shortest(name).encode(values, np.random.default_rng(seed)), values.size)
        for seed in range(10)
    ]
    exact = values.astype(float)
    whole = np.sum(exact**2)
    lost = np.mean([np.sum((draw - exact) ** 2) for draw in draws])
    assert lost <= whole * (1 - 1e-3 / values.size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("declared", [1 << 36, (1 << 36) + 1, 1 << 40, (1 << 42) - 1, 1 << 42])
def test_size_that_is_declared_takes_no_memory(name: str, declared: int) -> None:
    pipeline = shortest(name)
    header = pipeline.encode(np.ones(1, np.float32), rng())[: 4 + 1 + len(pipeline.wire_ids)]
    tracemalloc.start()
    try:
        # A reader of so many values has room for them, but for a block only if that is all it takes.
        for expected in {7, min(declared, MAX_VALUES)} if pipeline.streams else {7}:
            for payload in (b"", bytes(100), b"\xff" * 100):
                with pytest.raises(FrameError):
                    pipeline.decode(header + varint(declared) + payload, expected)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


@pytest.mark.parametrize("name", ["fixed-positions", "rice"])
@given(gaps=st.lists(st.integers(0, 5) | st.integers(0, 1 << 32), min_size=1, max_size=12), behind=st.integers(0, 9))
@example(gaps=[MAX_VALUES - 1], behind=0)
@example(gaps=[0, MAX_VALUES - 2], behind=0)
def test_positions_beyond_32_bits_come_back(name: str, gaps: list[int], behind: int) -> None:
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    size = int(positions[-1]) + 1 + behind
    coder = build_pipeline([{"codec": "top-k"}, {"codec": name}]).positions
    data = coder.encode(positions, size)
    assert len(data) <= coder.max_bytes(positions.size, size)
    reader = Reader(data)
    np.testing.assert_array_equal(coder.decode(reader, positions.size, size), positions)
    reader.end()


@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_the_largest_layout_are_whole_numbers_that_grow(name: str) -> None:
    """A product of sizes, widths and blocks that wrapped around would make one smaller."""
    bounds = [shortest(name).max_frame_bytes(1 << power) for power in range(37)]
    assert all(isinstance(bound, int) for bound in bounds)
    assert bounds == sorted(bounds)
    assert bounds[-1] >= (1 << 36) // 100 // 8
