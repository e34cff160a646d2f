"""What every codec must do, ours or installed: each is tried with its defaults."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import CODECS, Codec
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector

CATALOGUE = Path(__file__).parents[2] / "compression" / "fedcodec" / "README.md"
SIZES = (1, 2, 7, 1000)
DRAWS = 200

pytestmark = pytest.mark.parametrize("name", CODECS.names())


def make(name: str) -> Codec:
    return CODECS.get(name).configure({})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(num_values: int, seed: int = 1) -> Vector:
    return (rng(seed).standard_normal(num_values) * 1e-2).astype(np.float32)


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def decode(codec: Codec, payload: bytes | memoryview, num_values: int, block_values: int = 1 << 18) -> Vector:
    return np.concatenate(list(codec.blocks(memoryview(payload), num_values, block_values)))


def test_codec_is_registered_under_its_own_name(name: str) -> None:
    assert CODECS.get(name).name == name


def test_wire_id_fits_a_frame_and_is_nobody_elses(name: str) -> None:
    assert 1 <= CODECS.get(name).wire_id <= 0xFFFF
    assert [other for other in CODECS.names() if CODECS.get(other).wire_id == CODECS.get(name).wire_id] == [name]


def test_catalogue_gives_every_codec_of_ours_its_wire_id_and_traits(name: str) -> None:
    codec = CODECS.get(name)
    if not codec.__module__.startswith("fedcodec."):
        pytest.skip("not one of ours")
    traits = asdict(codec.traits)
    lines = CATALOGUE.read_text("utf-8").splitlines()
    heading = next(cells(line) for line in lines if line.startswith("| codec |"))
    row = next(cells(line) for line in lines if line.startswith(f"| `{name}` |"))
    said = {column.strip("`"): cell for column, cell in zip(heading, row, strict=True)}
    assert said["wire id"] == str(codec.wire_id)
    # A cell may go on after the word, as in "yes, up to …".
    assert {trait: said[trait].partition(",")[0] for trait in traits} == {
        trait: "yes" if holds else "no" for trait, holds in traits.items()
    }


def test_parameters_survive_json(name: str) -> None:
    codec = make(name)
    assert CODECS.get(name).configure(json.loads(json.dumps(codec.params()))) == codec


def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="no-such-parameter"):
        CODECS.get(name).configure({"no-such-parameter": 1})


@pytest.mark.parametrize("num_values", SIZES)
def test_payload_keeps_within_its_bound(name: str, num_values: int) -> None:
    codec = make(name)
    for values in (normal(num_values), np.zeros(num_values, np.float32), np.full(num_values, 2.0**40, np.float32)):
        assert memoryview(codec.encode(values, rng())).nbytes <= codec.max_payload_bytes(num_values)


def test_encoding_repeats_with_the_generator_and_leaves_the_values_alone(name: str) -> None:
    values = normal(500)
    before = values.copy()
    first, second = (bytes(make(name).encode(values, rng(3))) for _ in range(2))
    assert first == second
    assert values.tobytes() == before.tobytes()


@pytest.mark.parametrize("num_values", SIZES)
@pytest.mark.parametrize("block_values", [1, 3, 999, 1000, 1 << 18])
def test_blocks_have_the_asked_size_and_the_same_bits(name: str, num_values: int, block_values: int) -> None:
    codec = make(name)
    payload = bytes(codec.encode(normal(num_values), rng()))
    blocks = list(codec.blocks(memoryview(payload), num_values, block_values))
    assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
    assert [block.size for block in blocks[:-1]] == [block_values] * (len(blocks) - 1)
    assert sum(block.size for block in blocks) == num_values
    assert np.concatenate(blocks).tobytes() == decode(codec, payload, num_values).tobytes()


def test_payload_that_is_cut_short_or_goes_on_is_refused(name: str) -> None:
    codec = make(name)
    payload = bytes(codec.encode(normal(20), rng()))
    for wrong in (payload[:-1], payload[:1], b"", payload + b"\0", payload * 2):
        with pytest.raises(FrameError):
            decode(codec, wrong, 20)


@given(payload=st.binary(max_size=200), num_values=st.integers(1, 60))
def test_random_payload_is_refused_or_decodes_whole(name: str, payload: bytes, num_values: int) -> None:
    try:
        decoded = decode(make(name), payload, num_values)
    except FrameError:
        return
    assert decoded.size == num_values


def test_decoding_in_blocks_needs_no_memory_for_the_whole(name: str) -> None:
    codec = make(name)
    if not codec.traits.streams:
        pytest.skip("does not claim to stream")
    num_values, block_values = 1 << 20, 1 << 12
    payload = memoryview(bytes(codec.encode(normal(num_values), rng())))
    tracemalloc.start()
    try:
        for _ in codec.blocks(payload, num_values, block_values):
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 16 * 4 * block_values


def test_lossless_codec_keeps_every_bit(name: str) -> None:
    codec = make(name)
    if not codec.traits.lossless:
        pytest.skip("does not claim to be lossless")
    values = rng().integers(0, 1 << 32, size=10_000, dtype=np.uint32).view(np.float32)
    assert decode(codec, codec.encode(values, rng()), values.size).tobytes() == values.tobytes()


def test_lossless_codec_is_unbiased_and_a_contraction(name: str) -> None:
    traits = make(name).traits
    assert not traits.lossless or (traits.unbiased and traits.contraction)


def test_unbiased_codec_is_right_on_average(name: str) -> None:
    codec = make(name)
    if not codec.traits.unbiased:
        pytest.skip("does not claim to be unbiased")
    values = normal(100)
    draws = np.stack([decode(codec, codec.encode(values, rng(seed)), 100) for seed in range(DRAWS)]).astype(float)
    allowed = 6 * draws.std(axis=0) / np.sqrt(DRAWS) + 1e-6 * np.abs(values)
    assert (np.abs(draws.mean(axis=0) - values) <= allowed).all()


def test_contraction_loses_less_than_the_whole(name: str) -> None:
    codec = make(name)
    if not codec.traits.contraction:
        pytest.skip("does not claim to be a contraction")
    for scale in (2.0**-100, 1.0, 2.0**100):
        values = (normal(200) * np.float32(scale)).astype(float)
        draws = [decode(codec, codec.encode(values.astype(np.float32), rng(seed)), 200) for seed in range(20)]
        lost = np.mean([np.sum((draw - values) ** 2) for draw in draws])
        assert lost < np.sum(values**2)


def test_codec_that_keeps_sensitivity_makes_no_vector_longer(name: str) -> None:
    codec = make(name)
    if codec.traits.changes_sensitivity:
        pytest.skip("does not claim to keep it")
    for seed in range(20):
        values = normal(200, seed)
        decoded = decode(codec, codec.encode(values, rng(seed)), 200).astype(float)
        assert np.linalg.norm(decoded) <= np.linalg.norm(values.astype(float))
