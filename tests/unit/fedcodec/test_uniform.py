"""The evenly spaced quantisers against exact fractions, and their draws against an exact tail bound."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcodec.quantisers.uniform import Int2, Int4, Int8
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.layout import Vector

Stage = Int2 | Int4 | Int8
KINDS: list[type[Stage]] = [Int2, Int4, Int8]
FALSE_ALARM = 1e-9
"""At most how likely a right quantiser fails a test of its draws, were the seed another one."""

every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(num_values: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(num_values).astype(np.float32)


def decode(stage: Stage, values: Vector, seed: int = 0) -> Vector:
    coded = stage.encode(values, 0, np.random.default_rng(seed))
    assert coded.codes_n.dtype == np.uint8
    table = stage.read_table(Reader(coded.table), values.size)
    return stage.decode(coded.codes_n, table, 0).values_n


@every_kind
@given(
    num_values=st.integers(1, 700), block=st.integers(1, 256), exponent=st.integers(-100, 100), seed=st.integers(0, 99)
)
def test_value_becomes_one_of_the_two_levels_beside_it(
    kind: type[Stage], num_values: int, block: int, exponent: int, seed: int
) -> None:
    values = normal(num_values, seed) * np.float32(2.0**exponent)
    coded = kind(block=block).encode(values, 0, np.random.default_rng(seed))
    decoded = decode(kind(block=block), values, seed)
    for start in range(0, num_values, block):
        part = values[start : start + block]
        scale = np.abs(part).max()
        assert struct.unpack_from("<f", coded.table, 4 * (start // block))[0] == scale
        for index, value in enumerate(part, start):
            level = int(coded.codes_n[index]) - kind.levels
            exact = Fraction(float(value)) / Fraction(float(scale)) * kind.levels
            assert abs(level - exact) < 1 + Fraction(1, 1 << 16)
            assert decoded[index] == np.float32(np.float32(level) / np.float32(kind.levels)) * scale


@every_kind
def test_levels_themselves_are_kept(kind: type[Stage]) -> None:
    levels = np.arange(-kind.levels, kind.levels + 1).astype(np.float32)
    np.testing.assert_allclose(decode(kind(), levels * np.float32(0.125)), levels / 8, rtol=2.0**-22)


@every_kind
@pytest.mark.parametrize("share", [1e-3, 0.02, 0.25, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("sign", [1, -1])
def test_draws_are_right_on_average(kind: type[Stage], share: float, sign: int) -> None:
    """A million equal values between two levels: Bernstein bounds how far the number rounded up is from its mean."""
    num_values, step = 1_000_000, 0.37
    values = np.full(num_values, sign * share * step, np.float32)
    values[:: kind().block] = kind.levels * step
    exact = Fraction(float(values[1])) / Fraction(float(values[0])) * kind.levels
    chance = float(exact - math.floor(exact))
    ups = np.count_nonzero(decode(kind(), values) > values)
    num_draws = num_values - values[:: kind().block].size
    log = math.log(2 * 36 / FALSE_ALARM)  # two sides, 36 tests
    variance = num_draws * chance * (1 - chance)
    allowed = log / 3 + math.sqrt(log**2 / 9 + 2 * variance * log)
    assert abs(ups - num_draws * chance) <= allowed + num_draws * 2.0**-22 * (kind.levels + 1)


@every_kind
def test_draws_of_different_values_are_their_own(kind: type[Stage]) -> None:
    values = np.full(1000, 0.5 / kind.levels, np.float32)
    values[::250] = 1
    decoded = decode(kind(block=250), values)
    ups = (decoded > values).astype(float)
    assert 0 < ups[1:250].sum() < 249
    assert not np.array_equal(ups[:250], ups[250:500])
    assert not np.array_equal(decoded, decode(kind(block=250), values, seed=1))


@pytest.mark.parametrize("stage", [Int8(block=1 << 16), Int8(), Int4()])
def test_worst_block_loses_less_than_all_of_it(stage: Stage) -> None:
    """One value sets the scale, the others are a quarter of a level, where noise is most beside what is lost."""
    values = np.full(stage.block, 0.25 / stage.levels, np.float32)
    values[0] = 1
    lost = [np.sum((decode(stage, values, seed).astype(float) - values) ** 2) for seed in range(20)]
    assert np.mean(lost) < 0.95 * np.sum(values.astype(float) ** 2)


@every_kind
@given(pieces=st.lists(st.integers(1, 300), min_size=1, max_size=6), block=st.integers(1, 256))
def test_pieces_decode_as_the_whole_does(kind: type[Stage], pieces: list[int], block: int) -> None:
    stage = kind(block=block)
    values = normal(sum(pieces), 1)
    coded = stage.encode(values, 0, np.random.default_rng(0))
    table = stage.read_table(Reader(coded.table), values.size)
    ends = np.cumsum(pieces)
    found = [stage.decode(coded.codes_n[end - n : end], table, end - n) for n, end in zip(pieces, ends, strict=True)]
    whole = stage.decode(coded.codes_n, table, 0).values_n
    np.testing.assert_array_equal(np.concatenate([each.values_n for each in found]), whole)


@every_kind
def test_vector_of_many_chunks_is_quantised_as_its_blocks_are(kind: type[Stage]) -> None:
    values = normal(50_001, 2)
    coded = kind(block=100).encode(values, 0, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    parts = [kind(block=100).encode(values[start : start + 100], 0, rng) for start in range(0, values.size, 100)]
    assert coded.table == b"".join(part.table for part in parts)
    np.testing.assert_array_equal(coded.codes_n, np.concatenate([part.codes_n for part in parts]))


@every_kind
@pytest.mark.parametrize("extreme", [3.4028235e38, 1.1754944e-38, 1e-45])
def test_largest_and_smallest_scales_are_kept(kind: type[Stage], extreme: float) -> None:
    values = np.array([extreme, -extreme, 0.0, -0.0], np.float32)
    decoded = decode(kind(), values)
    np.testing.assert_array_equal(decoded, values)
    assert not np.signbit(decoded[2:]).any()


@every_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_block_with_a_value_that_is_not_finite_is_nan_and_no_other_is(kind: type[Stage], bad: float) -> None:
    values = np.array([1, -1, bad, 1, 1, -1], np.float32)
    decoded = decode(kind(block=2), values)
    np.testing.assert_array_equal(np.isnan(decoded), [False, False, True, True, False, False])
    np.testing.assert_array_equal(decoded[[0, 1, 4, 5]], values[[0, 1, 4, 5]])


@pytest.mark.parametrize("scale", ["00000080", "000080bf", "0000807f", "000080ff", "0100c07f", "0000c0ff", "0000"])
def test_scale_that_encoding_does_not_write_is_refused(scale: str) -> None:
    with pytest.raises(FrameError, match="scale"):
        Int8().read_table(Reader(bytes.fromhex(scale)), 3)


@pytest.mark.parametrize("scale", ["00000000", "0000c07f"])
def test_levels_of_a_block_without_a_scale_are_zero(scale: str) -> None:
    pipeline = build_pipeline([{"codec": "int8", "block": 2}])
    start = "5254463101" + "20" + "04" + scale + "0000803f"
    pipeline.decode(bytes.fromhex(start + "7f7ffe7f"), 4)
    with pytest.raises(FrameError, match="level other than 0"):
        pipeline.decode(bytes.fromhex(start + "7f80fe7f"), 4)


@pytest.mark.parametrize(("codec", "codes"), [("int8", "ff"), ("int4", "0f"), ("int2", "03")])
def test_code_above_the_highest_level_is_refused(codec: str, codes: str) -> None:
    pipeline = build_pipeline([{"codec": codec}])
    frame = pipeline.encode(np.ones(1, np.float32), np.random.default_rng(0))
    with pytest.raises(FrameError, match="code"):
        pipeline.decode(frame[:-1] + bytes.fromhex(codes), 1)
