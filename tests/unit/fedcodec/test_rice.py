"""Rice codes against a writer that follows docs/wire-format.md bit by bit, and against the entropy of positions."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcodec.base import PositionCoder, Positions
from fedcodec.coders.fixed import FixedPositions
from fedcodec.coders.rice import Rice
from fedcodec.reader import Reader
from fedcore.errors import FrameError

# Share written: bits for each position at random ones, from the formula w + 1 / (1 − (1 − p)^(2^w)).
BITS_BY_SHARE = {
    0.3: 2.961,
    0.2: 3.694,
    0.1: 4.756,
    0.05: 5.786,
    0.01: 8.108,
    0.005: 9.112,
    0.0025: 10.114,
    0.001: 11.495,
}


def as_bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))


def written(positions: list[int], width: int) -> bytes:
    bits, before = "", -1
    for position in positions:
        quotient, remainder = divmod(position - before - 1, 1 << width)
        bits += "1" * quotient + "0" + "".join(str(remainder >> place & 1) for place in range(width))
        before = position
    return bytes([width]) + as_bytes(bits)


def shortest_width(positions: list[int]) -> int:
    gaps = [after - before - 1 for before, after in zip([-1, *positions], positions, strict=False)]
    return min(range(32), key=lambda width: (sum((gap >> width) + 1 + width for gap in gaps), width))


def array(positions: list[int]) -> Positions:
    return np.array(positions, dtype=np.int64)


def decode(data: bytes, count: int, size: int) -> list[int]:
    reader = Reader(data)
    positions = Rice().decode(reader, count, size)
    reader.end()
    return list(map(int, positions))


def at_random(share: float, size: int, seed: int = 0) -> Positions:
    return np.flatnonzero(np.random.default_rng(seed).random(size) < share)


gap = st.integers(0, 3) | st.integers(0, 300) | st.integers(0, 1 << 14)
gaps = st.lists(gap, max_size=60)


@given(gaps=gaps, behind=st.integers(0, 1000))
@example(gaps=[0] * 100, behind=0)
@example(gaps=[1 << 14] * 100 + [0] * 500, behind=0)
@example(gaps=[1, 0] * 20_000, behind=1)
@example(gaps=[(1 << 14) - 1] + [0] * 20_000, behind=0)
@example(gaps=[1 << 14] + [0] * 20_000, behind=0)
@example(gaps=[5, 1 << 15] + [0] * 40_000, behind=0)
def test_bytes_are_the_documented_ones_and_decode(gaps: list[int], behind: int) -> None:
    positions = [int(position) for position in np.cumsum(array(gaps) + 1) - 1]
    size = max(1, sum(gaps) + len(gaps) + behind)
    data = Rice().encode(array(positions), size)
    assert data == written(positions, shortest_width(positions))
    assert len(data) <= Rice().max_bytes(len(positions), size)
    # Whatever follows is not touched.
    reader = Reader(data + b"\xff" * 9)
    assert list(map(int, Rice().decode(reader, len(positions), size))) == positions
    assert reader.left == 9


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01, 1e-4])
def test_long_strings_decode(share: float) -> None:
    positions = at_random(share, 300_000)
    data = Rice().encode(positions, 300_000)
    np.testing.assert_array_equal(Rice().decode(Reader(data), positions.size, 300_000), positions)


def test_farthest_position_there_can_be() -> None:
    size = 1 << 36
    for positions in ([size - 1], [0, size - 1], [size - 3, size - 2, size - 1]):
        data = Rice().encode(array(positions), size)
        assert data == written(positions, shortest_width(positions))
        assert decode(data, len(positions), size) == positions
        assert len(data) <= Rice().max_bytes(len(positions), size)


@pytest.mark.parametrize("coder", [Rice(), FixedPositions()], ids=lambda coder: coder.name)
@pytest.mark.parametrize("size", [1, 2, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) + 1])
def test_positions_take_four_bytes_where_that_is_enough(coder: PositionCoder, size: int) -> None:
    positions = sorted({0, size // 3, size - 1})
    found = coder.decode(Reader(coder.encode(array(positions), size)), len(positions), size)
    assert found.tolist() == positions
    assert found.itemsize == (4 if size < 1 << 31 else 8)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_decoding_takes_memory_for_the_positions_and_a_block(share: float) -> None:
    positions = at_random(share, 4_000_000)
    data = Rice().encode(positions, 4_000_000)
    tracemalloc.start()
    try:
        Rice().decode(Reader(data), positions.size, 4_000_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * positions.size + 2_500_000


@pytest.mark.parametrize(("share", "bits"), BITS_BY_SHARE.items())
def test_random_positions_take_what_the_formula_says_and_little_more_than_their_entropy(
    share: float, bits: float
) -> None:
    size = 4_000_000
    positions = at_random(share, size)
    used = 8 * len(Rice().encode(positions, size)) / positions.size
    assert used == pytest.approx(bits, rel=0.01)
    share = positions.size / size
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / share
    assert share > 0.11 or used < 1.03 * entropy


@given(count=st.integers(0, 50), size=st.integers(1, 2000))
def test_bound_grows_with_the_count_and_is_reached(count: int, size: int) -> None:
    count = min(count, size)
    bounds = [Rice().max_bytes(fewer, size) for fewer in range(count + 1)]
    assert bounds == sorted(bounds)
    last = [*range(count - 1), size - 1] if count else []
    assert len(Rice().encode(array(last), size)) <= bounds[-1]


@given(gaps=gaps, at=st.integers(0, 10_000), cut=st.integers(1, 10_000), change=st.integers(1, 255))
def test_changed_and_cut_bytes_are_refused_or_other_positions(gaps: list[int], at: int, cut: int, change: int) -> None:
    positions = array(gaps).cumsum() + np.arange(len(gaps))
    size = sum(gaps) + len(gaps) + 10
    data = Rice().encode(positions, size)
    with pytest.raises(FrameError):
        decode(data[: -min(cut, len(data))], len(gaps), size)
    changed = bytearray(data)
    changed[at % len(data)] ^= change
    try:
        found = decode(bytes(changed), len(gaps), size)
    except FrameError:
        return
    assert found != list(positions)
    assert Rice().encode(array(found), size) == changed


@given(data=st.binary(max_size=30), count=st.integers(0, 40), size=st.integers(40, 1000))
def test_random_bytes_decode_only_to_what_encodes_to_them(data: bytes, count: int, size: int) -> None:
    for start in (data, b"\0" + data, b"\2" + data):
        reader = Reader(start)
        try:
            positions = Rice().decode(reader, count, size)
        except FrameError:
            continue
        assert positions.size == count
        assert Rice().encode(positions, size) == start[: len(start) - reader.left]


@pytest.mark.parametrize("positions", [[], [5], [0, 1, 2], [3, 99, 100, 640, 999]])
def test_only_the_shortest_width_is_read(positions: list[int]) -> None:
    for width in range(32):
        data = written(positions, width)
        if width == shortest_width(positions):
            assert decode(data, len(positions), 1000) == positions
        else:
            with pytest.raises(FrameError):
                decode(data, len(positions), 1000)


@pytest.mark.parametrize(
    ("data", "count", "text"),
    [
        (b"", 1, "width of remainders"),
        (b"\x20\0\0\0\0\0", 1, "remainders of 32 bits, at most 31"),
        (b"\0", 1, "1 positions in 0 bits"),
        (b"\0\xff", 1, "cut short"),
        (b"\0" + b"\xff" * 125, 1, "cut short"),
        (written([1000], 9), 1, "position 1000: below 1000"),
        (written([999, 1000], 8), 2, "position 1000: below 1000"),
        (written([0], 0)[:1] + b"\2", 1, "bits behind the last position"),
        (written([100], 3), 1, "remainders of 3 bits, shortest are"),
        (b"\1", 0, "remainders of 1 bits, shortest are 0"),
    ],
)
def test_what_is_not_written_is_refused_with_a_sentence(data: bytes, count: int, text: str) -> None:
    with pytest.raises(FrameError, match=text):
        decode(data, count, 1000)


@pytest.mark.parametrize("width", [0, 5, 31])
@pytest.mark.parametrize("filling", [b"\xff", b"\0"])
@pytest.mark.parametrize("count", [1, 1 << 30])
def test_huge_quotients_and_counts_take_memory_for_a_block_only(width: int, filling: bytes, count: int) -> None:
    hostile = bytes([width]) + filling * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode(hostile, count, 1 << 40)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_500_000
