"""rand-k against hashes computed with whole numbers, and against what chance says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcodec.selectors.rand_k import CHUNK_VALUES, RandK, smallest_hashes, splitmix64

WORD = (1 << 64) - 1
FALSE_ALARM = 1e-6
"""At most how likely right draws fail a test, were the seed another one."""


def mixed(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def smallest(seed: int, count: int, size: int) -> list[int]:
    return sorted(sorted(range(size), key=lambda at: (mixed((seed + at) & WORD), at))[:count])


def unmixed(word: int) -> int:
    """Return what `mixed` makes this word of."""
    word = word ^ word >> 31 ^ word >> 62
    word = word * pow(0x94D049BB133111EB, -1, 1 << 64) & WORD
    word = word ^ word >> 27 ^ word >> 54
    word = word * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & WORD
    word = word ^ word >> 30 ^ word >> 60
    return (word - 0x9E3779B97F4A7C15) & WORD


def test_the_generator_gives_its_published_numbers() -> None:
    # The first numbers of java.util.SplittableRandom(0) and of splitmix64.c seeded with 1234567.
    words = np.array([0, 1234567], dtype=np.uint64)
    assert splitmix64(words).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]
    assert words.tolist() == [0, 1234567]


seeds = st.integers(0, WORD) | st.integers(WORD - 300, WORD)


@given(seed=seeds, size=st.integers(1, 300), share=st.floats(0, 1))
@example(seed=0, size=1, share=1.0)
@example(seed=WORD, size=2 * CHUNK_VALUES + 5, share=0.01)
@example(seed=1, size=CHUNK_VALUES, share=1.0)
def test_positions_are_those_of_the_smallest_hashes(seed: int, size: int, share: float) -> None:
    count = max(1, math.floor(share * size))
    assert smallest_hashes(seed, count, size).tolist() == smallest(seed, count, size)


def test_many_seeds() -> None:
    words = np.arange(5000, dtype=np.uint64)
    for seed in range(0, 300 * 5000, 5000):
        expected = np.sort(np.argsort(splitmix64(words + np.uint64(seed)))[:100])
        np.testing.assert_array_equal(smallest_hashes(seed, 100, 5000), expected)


@pytest.mark.parametrize("hash_", [0, WORD, WORD - 1])
def test_seeds_that_lead_to_the_ends_of_the_words(hash_: int) -> None:
    seed = unmixed(hash_)
    assert mixed(seed) == hash_
    for count, size in [(1, 1), (1, 5), (5, 5)]:
        assert smallest_hashes(seed, count, size).tolist() == smallest(seed, count, size)


@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    fraction=st.floats(0, 1, exclude_min=True),
    draw=st.integers(0, 1000),
)
def test_values_are_scaled_and_decode_at_their_positions(numbers: list[float], fraction: float, draw: int) -> None:
    values = np.array(numbers, dtype=np.float32)
    pipeline = build_pipeline([{"codec": "rand-k", "fraction": fraction}])
    frame = pipeline.encode(values, np.random.default_rng(draw))
    count = math.ceil(fraction * values.size)
    assert len(frame) == pipeline.max_frame_bytes(values.size) == 7 + 8 + 4 * count
    seed = int.from_bytes(frame[7:15], "little")
    expected = np.zeros_like(values)
    with np.errstate(over="ignore", under="ignore"):
        for at in smallest(seed, count, values.size):
            expected[at] = np.float32(numbers[at] * (values.size / count))
    assert pipeline.decode(frame, values.size).tobytes() == expected.tobytes()


def test_all_of_the_values_are_themselves_and_nan_stays_nan() -> None:
    values = np.array([1.5, -0.0, np.inf, 1e-45], dtype=np.float32)
    found = RandK(fraction=1).select(values, np.random.default_rng(0))
    assert found.positions_n.tolist() == [0, 1, 2, 3]
    assert found.values_n.tobytes() == values.tobytes()
    signalling = np.array([0x7FA00001, 0xFFC00000], dtype=np.uint32).view(np.float32)
    assert np.isnan(RandK(fraction=0.5).select(signalling, np.random.default_rng(0)).values_n).all()


def test_every_position_and_pair_is_as_likely() -> None:
    size, count, draws = 12, 4, 6000
    kept = np.zeros((draws, size))
    rng = np.random.default_rng(0)
    stage = RandK(fraction=count / size)
    for draw in range(draws):
        kept[draw, stage.select(np.ones(size, np.float32), rng).positions_n] = 1
    together = kept.T @ kept / draws
    pair = count * (count - 1) / (size * (size - 1))
    for found, chance in [(np.diag(together), count / size), (together[~np.eye(size, dtype=bool)], pair)]:
        # Bernstein's bound for a binomial, the chance of a false alarm shared by 12 positions and 66 pairs.
        log = math.log(2 * 78 / FALSE_ALARM)
        allowed = log / 3 + math.sqrt(log**2 / 9 + 2 * draws * chance * (1 - chance) * log)
        assert draws * np.abs(found - chance).max() <= allowed
