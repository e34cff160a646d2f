"""What every stage must do, ours or installed: each with its defaults, in the shortest pipeline that has it."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import CODECS, Pipeline, build_pipeline
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector
from fedcore.part import dense_blocks
from tests.support.pipelines import shortest

CATALOGUE = Path(__file__).parents[2] / "compression" / "fedcodec" / "README.md"
SIZES = (1, 2, 7, 1000)
DRAWS = 200

pytestmark = pytest.mark.parametrize("name", CODECS.names())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(num_values: int, seed: int = 1) -> Vector:
    return (rng(seed).standard_normal(num_values) * 1e-2).astype(np.float32)


def encode(pipeline: Pipeline, values: Vector, seed: int = 0) -> bytes:
    return pipeline.encode(values, rng(seed))


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_stage_is_registered_under_its_own_name(name: str) -> None:
    assert CODECS.get(name).name == name


def test_wire_id_fits_a_frame_and_is_nobody_elses(name: str) -> None:
    assert 1 <= CODECS.get(name).wire_id <= 0xFFFF
    assert [other for other in CODECS.names() if CODECS.get(other).wire_id == CODECS.get(name).wire_id] == [name]


def test_catalogue_gives_every_stage_of_ours_its_wire_id_and_traits(name: str) -> None:
    stage = CODECS.get(name)
    if not stage.__module__.startswith("fedcodec."):
        pytest.skip("not one of ours")
    traits = asdict(stage.traits)
    lines = CATALOGUE.read_text("utf-8").splitlines()
    heading = next(cells(line) for line in lines if line.startswith("| codec |"))
    row = next(cells(line) for line in lines if line.startswith(f"| `{name}` |"))
    said = {column.strip("`"): cell for column, cell in zip(heading, row, strict=True)}
    assert said["wire id"] == str(stage.wire_id)
    assert said["kind"] == stage.kind
    # A cell may go on after the word, as in "yes, up to …".
    assert {trait: said[trait].partition(",")[0] for trait in traits} == {
        trait: "yes" if holds else "no" for trait, holds in traits.items()
    }


def test_parameters_survive_json(name: str) -> None:
    stage = CODECS.get(name).configure({})
    assert CODECS.get(name).configure(json.loads(json.dumps(stage.params()))) == stage
    assert build_pipeline(json.loads(json.dumps(shortest(name).as_json()))) == shortest(name)


def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="no-such-parameter"):
        CODECS.get(name).configure({"no-such-parameter": 1})


@pytest.mark.parametrize("num_values", SIZES)
def test_frame_keeps_within_its_bound(name: str, num_values: int) -> None:
    pipeline = shortest(name)
    for values in (normal(num_values), np.zeros(num_values, np.float32), np.full(num_values, 2.0**40, np.float32)):
        assert len(encode(pipeline, values)) <= pipeline.max_frame_bytes(num_values)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_frame_of_fixed_size_is_as_long_as_its_bound(name: str, by_tensor: bool) -> None:
    pipeline = replace(shortest(name), by_tensor=by_tensor)
    if not pipeline.fixed_size:
        pytest.skip("its frames vary")
    for values in (normal(1000), np.zeros(1000, np.float32), np.full(1000, 2.0**40, np.float32)):
        frame = pipeline.encode(values, rng(), (1, 2, 997))
        assert len(frame) == pipeline.max_frame_bytes((1, 2, 997))


def test_encoding_repeats_with_the_generator_and_leaves_the_values_alone(name: str) -> None:
    values = normal(500)
    before = values.copy()
    first, second = (encode(shortest(name), values, 3) for _ in range(2))
    assert first == second
    assert values.tobytes() == before.tobytes()


@pytest.mark.parametrize("sizes", [(1,), (7,), (3, 0, 1, 996), (1,) * 50])
def test_parts_are_the_vector_in_order(name: str, sizes: tuple[int, ...]) -> None:
    pipeline, num_values = shortest(name), sum(sizes)
    frame = pipeline.encode(normal(num_values), rng(), sizes)
    assert len(frame) <= pipeline.max_frame_bytes(sizes)
    decoded = pipeline.decode(frame, sizes)
    start = 0
    for part in pipeline.open(frame, sizes):
        assert part.start == start
        assert part.values_n.dtype == np.float32
        assert part.dense().tobytes() == decoded[start : start + part.size].tobytes()
        start += part.size
    assert start == num_values == decoded.size
    blocks = list(dense_blocks(pipeline.open(frame, sizes), 3))
    assert np.concatenate(blocks).tobytes() == decoded.tobytes()


def test_frame_that_is_cut_short_or_goes_on_is_refused(name: str) -> None:
    pipeline = shortest(name)
    frame = encode(pipeline, normal(20))
    for wrong in (*(frame[:end] for end in range(len(frame))), frame + b"\0", frame * 2):
        with pytest.raises(FrameError):
            pipeline.decode(wrong, 20)


@given(payload=st.binary(max_size=200), num_values=st.integers(1, 60))
def test_random_payload_is_refused_or_decodes_whole(name: str, payload: bytes, num_values: int) -> None:
    pipeline = shortest(name)
    header = encode(pipeline, np.zeros(num_values, np.float32))[: len(pipeline.wire_ids) + 6]
    try:
        decoded = pipeline.decode(header + payload, num_values)
    except FrameError:
        return
    assert decoded.size == num_values


def test_dense_frames_decode_without_memory_for_the_whole(name: str) -> None:
    pipeline = shortest(name)
    if not pipeline.streams:
        pytest.skip("does not stream")
    num_values = 1 << 22
    frame = encode(pipeline, normal(num_values))
    tracemalloc.start()
    try:
        for _ in pipeline.open(frame, num_values):
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < num_values  # a quarter of the values


def test_lossless_pipeline_keeps_every_bit(name: str) -> None:
    pipeline = shortest(name)
    if not pipeline.traits.lossless:
        pytest.skip("does not claim to be lossless")
    values = rng().integers(0, 1 << 32, size=10_000, dtype=np.uint32).view(np.float32)
    assert pipeline.decode(encode(pipeline, values), values.size).tobytes() == values.tobytes()


def test_lossless_is_unbiased_and_a_contraction(name: str) -> None:
    traits = CODECS.get(name).traits
    assert not traits.lossless or (traits.unbiased and traits.contraction)


def test_unbiased_pipeline_is_right_on_average(name: str) -> None:
    pipeline = shortest(name)
    if not pipeline.traits.unbiased:
        pytest.skip("does not claim to be unbiased")
    values = normal(100)
    draws = np.stack([pipeline.decode(encode(pipeline, values, seed), 100) for seed in range(DRAWS)]).astype(float)
    # The largest deviation, for a value beside a level may get the same code in every draw. Means of so many draws
    # are normal to a good approximation: for a right codec and another seed, one of 100 is as far off once in 10^7.
    allowed = 6.5 * draws.std(axis=0, ddof=1).max() / np.sqrt(DRAWS) + 1e-6 * np.abs(values)
    assert (np.abs(draws.mean(axis=0) - values) <= allowed).all()


def test_contraction_loses_less_than_the_whole(name: str) -> None:
    pipeline = shortest(name)
    if not pipeline.traits.contraction:
        pytest.skip("does not claim to be a contraction")
    for scale in (2.0**-100, 1.0, 2.0**100):
        values = (normal(200) * np.float32(scale)).astype(float)
        draws = [pipeline.decode(encode(pipeline, values.astype(np.float32), seed), 200) for seed in range(20)]
        lost = np.mean([np.sum((draw - values) ** 2) for draw in draws])
        assert lost < np.sum(values**2)


def test_pipeline_that_keeps_sensitivity_makes_no_vector_longer(name: str) -> None:
    pipeline = shortest(name)
    if pipeline.traits.changes_sensitivity:
        pytest.skip("does not claim to keep it")
    for seed in range(20):
        values = normal(200, seed)
        decoded = pipeline.decode(encode(pipeline, values, seed), 200).astype(float)
        assert np.linalg.norm(decoded) <= np.linalg.norm(values.astype(float))
