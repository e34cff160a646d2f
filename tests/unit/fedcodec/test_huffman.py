"""Huffman codes against Huffman's own algorithm, all trees of few symbols, and a decoder that goes bit by bit."""

from __future__ import annotations

import heapq
import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcodec.base import Codes
from fedcodec.coders import huffman
from fedcodec.coders.huffman import MAX_LENGTH, RUN_CODES, Huffman, code_lengths, merged_lengths, package_merge
from fedcodec.reader import Reader
from fedcore.errors import FrameError, InvalidInput

FIBONACCI = [1, 1]
while len(FIBONACCI) < 24:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def encode(codes: Sequence[int] | Codes, num_codes: int) -> bytes:
    return bytes(Huffman().encode(np.array(codes, dtype=np.uint8), num_codes))


def decode(data: bytes, count: int, num_codes: int) -> list[int]:
    reader = Reader(data)
    found: list[int] = Huffman().decode(reader, count, num_codes).tolist()
    reader.end()
    return found


def numbers(data: bytes, width: int) -> list[int]:
    """Return the numbers of a bit string, and of bits behind the last one nothing."""
    bits = int.from_bytes(data, "little")
    return [bits >> at & ((1 << width) - 1) for at in range(0, 8 * len(data) - width + 1, width)]


def bit_string(values: Sequence[int], width: int) -> bytes:
    number = sum(value << width * place for place, value in enumerate(values))
    return number.to_bytes(-(-len(values) * width // 8), "little")


def decoded_bit_by_bit(data: bytes, count: int, num_codes: int) -> list[int]:
    """Decode as docs/wire-format.md says, a code at a time, without looking at the lengths of runs."""
    head = -(-num_codes // 2)
    lengths = numbers(data[:head], 4)[:num_codes]
    occurring = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(occurring) < 2:
        return [symbol for _, symbol in occurring] * count
    by_code: dict[str, int] = {}
    code, before = 0, 0
    for length, symbol in occurring:
        code <<= length - before
        by_code[f"{code:0{length}b}"] = symbol
        code, before = code + 1, length
    num_runs = math.ceil(count / RUN_CODES)
    bits = iter(numbers(data[head + math.ceil(14 * num_runs / 8) :], 1))
    found = []
    for _ in range(count):
        word = ""
        while word not in by_code:
            word += str(next(bits))
        found.append(by_code[word])
    assert not any(bits)
    return found


def huffman_cost(counts: Sequence[int]) -> int:
    """Return the least sum of counts · lengths by merging the two rarest, lengths without a limit."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


def cost(counts: Sequence[int]) -> tuple[int, list[int]]:
    lengths = code_lengths(np.array(counts, dtype=np.int64)).tolist()
    return sum(count * length for count, length in zip(counts, lengths, strict=True)), lengths


def kraft(lengths: Sequence[int]) -> float:
    return sum(2.0**-length for length in lengths if length)


def limited_cost(counts: Sequence[int], limit: int) -> int:
    """Return the least sum for lengths up to a limit, by dynamic programming over levels of the tree.

    The more frequent a symbol, the nearer its leaf to the root. The state is how many have one, and how many
    nodes of the level may branch.
    """
    ordered = sorted((count for count in counts if count), reverse=True)
    states, best = {(0, 1): 0}, 1 << 60
    for _ in range(limit):
        following: dict[tuple[int, int], int] = {}
        for (placed, num_open), so_far in states.items():
            total = so_far + sum(ordered[placed:])
            for leaves in range(min(2 * num_open, len(ordered) - placed) + 1):
                if placed + leaves == len(ordered):
                    best = min(best, total)
                elif leaves < 2 * num_open:
                    state = (placed + leaves, min(2 * num_open - leaves, len(ordered)))
                    following[state] = min(total, following.get(state, total))
        states = following
    return best


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=256).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_code_is_complete_and_the_shortest(counts: list[int]) -> None:
    total, lengths = cost(counts)
    assert [bool(length) for length in lengths] == [bool(count) for count in counts]
    assert kraft(lengths) == 1
    assert max(lengths) <= MAX_LENGTH
    # Counts up to 1000 of up to 256 symbols may want more than 15 bits, and rarely do.
    if total != huffman_cost(counts):
        assert MAX_LENGTH in lengths
        assert total > huffman_cost(counts)
    shares = np.array([count for count in counts if count]) / sum(counts)
    entropy = -np.sum(shares * np.log2(shares)) * sum(counts)
    assert entropy - 1e-6 * total <= total < entropy + sum(counts)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_no_tree_of_few_symbols_is_shorter(counts: list[int]) -> None:
    best = min(
        sum(count * length for count, length in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, 5), repeat=len(counts))
        if kraft(lengths) <= 1
    )
    assert cost(counts)[0] == best


@pytest.mark.parametrize("num_symbols", [16, 17, 20, 24])
def test_length_is_limited_and_the_limited_code_the_shortest(num_symbols: int) -> None:
    counts = FIBONACCI[:num_symbols]
    total, lengths = cost(counts)
    assert max(lengths) == MAX_LENGTH
    assert kraft(lengths) == 1
    assert total == limited_cost(counts, MAX_LENGTH)
    assert (total == huffman_cost(counts)) == (num_symbols == 16)


# Few different weights: what is equal must be taken in the same order.
weight = st.integers(1, 3) | st.integers(1, 40) | st.integers(1, 1 << 40) | st.sampled_from(FIBONACCI)


@given(st.lists(weight, min_size=2, max_size=256).map(sorted) | st.integers(2, 24).map(lambda num: FIBONACCI[:num]))
def test_lengths_by_merging_are_those_by_packages_unless_they_are_too_long(weights: list[int]) -> None:
    merged = merged_lengths(weights)
    assert sum(map(math.prod, zip(weights, merged, strict=True))) == huffman_cost(weights)
    packaged = package_merge(np.array(weights, dtype=np.int64)).tolist()
    assert (packaged == merged) == (merged[0] <= MAX_LENGTH)
    assert code_lengths(np.array(weights, dtype=np.int64)).tolist() == packaged


@given(st.lists(st.integers(1, 50), min_size=2, max_size=9))
def test_oracle_for_limited_codes_agrees_with_huffman_where_there_is_no_limit(counts: list[int]) -> None:
    assert limited_cost(counts, 8) == huffman_cost(counts)


def test_equally_frequent_symbols_of_a_power_of_two_have_equal_codes() -> None:
    assert cost([7] * 256)[1] == [8] * 256
    assert cost([0, 3, 3, 0, 3, 3])[1] == [0, 2, 2, 0, 2, 2]
    # Of several shortest codes the one with the shorter longest code, and of equals the later symbol is shorter.
    assert cost([1, 1, 2, 2])[1] == [2, 2, 2, 2]
    assert cost([1, 1, 1])[1] == [2, 2, 1]


@given(st.integers(1, 256).flatmap(lambda num: st.tuples(st.just(num), st.lists(st.integers(0, num - 1), max_size=60))))
def test_codes_come_back(case: tuple[int, list[int]]) -> None:
    num_codes, codes = case
    data = encode(codes, num_codes)
    assert len(data) <= Huffman().max_bytes(len(codes), num_codes)
    assert decode(data, len(codes), num_codes) == codes
    assert decoded_bit_by_bit(data, len(codes), num_codes) == codes


def skewed(count: int, num_codes: int, share: float) -> npt.NDArray[np.uint8]:
    drawn = np.random.default_rng(count).geometric(share, count) - 1
    return np.minimum(drawn, num_codes - 1).astype(np.uint8)


@pytest.mark.parametrize("count", [RUN_CODES - 1, RUN_CODES, RUN_CODES + 1, 2 * RUN_CODES + 3, (1 << 16) + 5])
@pytest.mark.parametrize(("num_codes", "share"), [(2, 0.5), (16, 0.4), (256, 0.02), (256, 0.6)])
def test_runs_come_back(count: int, num_codes: int, share: float) -> None:
    codes = skewed(count, num_codes, share)
    data = encode(codes, num_codes)
    assert decode(data, count, num_codes) == codes.tolist() == decoded_bit_by_bit(data, count, num_codes)
    counts = list(Counter(codes.tolist()).values())
    num_bits = huffman_cost(counts)
    assert len(data) == math.ceil(num_codes / 2) + math.ceil(14 * math.ceil(count / RUN_CODES) / 8) + math.ceil(
        num_bits / 8
    )


def test_more_runs_than_are_decoded_at_once_come_back() -> None:
    count = 5000 * RUN_CODES + 7
    codes = skewed(count, 16, 0.4)
    data = Huffman().encode(codes, 16)
    np.testing.assert_array_equal(Huffman().decode(Reader(data), count, 16), codes)


def test_longest_codes_come_back() -> None:
    codes = np.repeat(np.arange(24, dtype=np.uint8), FIBONACCI)
    codes = np.random.default_rng(0).permutation(codes)
    # The rare ones side by side, so that a group of four takes all of its 60 bits.
    codes = np.concatenate([np.arange(8, dtype=np.uint8), codes])
    assert decode(encode(codes, 24), codes.size, 24) == codes.tolist()


def test_bytes_are_as_documented() -> None:
    # Symbol 2 occurs 4 times, 0 twice, 3 once: lengths 2, -, 1, 2, and so the codes 10, -, 0, 11.
    expected = bytes([0x02, 0x21]) + bit_string([10], 14) + bits("0 10 0 11 0 10 0")
    assert encode([2, 0, 2, 3, 2, 0, 2], 4) == expected
    assert expected == bytes.fromhex("02210a00b200")  # as docs/wire-format.md has it
    assert encode([5] * 3000, 7) == bytes([0, 0, 0x10, 0])
    assert encode([], 7) == bytes(4)


def bits(text: str) -> bytes:
    return bit_string([int(bit) for bit in text.replace(" ", "")], 1)


def framed(lengths: Sequence[int], run_bits: Sequence[int], text: str) -> bytes:
    return bit_string(lengths, 4) + bit_string(run_bits, 14) + bits(text)


def outcome(data: bytes | bytearray, count: int, num_codes: int, few_runs: int) -> list[int] | str:
    """Decode, if there are more runs than so many a step in all of them at once, else code by code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "_FEW_RUNS", few_runs)
        try:
            return decode(bytes(data), count, num_codes)
        except FrameError as error:
            return str(error)


@given(
    count=st.integers(1, 5 * RUN_CODES) | st.sampled_from([RUN_CODES - 1, RUN_CODES, RUN_CODES + 1, 2 * RUN_CODES]),
    num_codes=st.sampled_from([2, 3, 16, 255]),
    share=st.floats(0.01, 0.9),
    flips=st.lists(st.integers(0, 1 << 20), max_size=3),
    moved=st.integers(-2, 2),
)
def test_few_runs_are_read_like_many(count: int, num_codes: int, share: float, flips: list[int], moved: int) -> None:
    codes = skewed(count, num_codes, share)
    data = bytearray(encode(codes, num_codes))
    if not flips and not moved:
        assert outcome(data, count, num_codes, 0) == outcome(data, count, num_codes, 5) == codes.tolist()
    head = -(-num_codes // 2)
    for flip in flips:
        at = flip % (8 * len(data))
        data[at // 8] ^= 1 << at % 8
    if count > RUN_CODES and len(data) > head + 4:
        # The sum of the lengths stays, so that the runs are looked at.
        run_bits = int.from_bytes(data[head : head + 4], "little") + moved - (moved << 14)
        data[head : head + 4] = (run_bits % (1 << 32)).to_bytes(4, "little")
    assert outcome(data, count, num_codes, 0) == outcome(data, count, num_codes, 5)


def test_many_longest_codes_side_by_side_are_read_one_by_one() -> None:
    frequent = [np.full(256 << place, place, dtype=np.uint8) for place in range(8)]
    codes = np.concatenate([np.arange(8, 256, dtype=np.uint8), *frequent])
    assert code_lengths(np.bincount(codes))[8:72].tolist() == [MAX_LENGTH] * 64
    assert outcome(encode(codes, 256), codes.size, 256, codes.size) == codes.tolist()


HOSTILE = {
    "nothing": (b"", 3),
    "lengths cut short": (bytes([0x02]), 3),
    "no lengths for codes": (bytes(2), 3),
    "a length for no codes": (bytes([1, 0]), 0),
    "lengths for no codes": (bytes([0x11, 0]), 0),
    "one symbol of length 2": (bytes([2, 0]), 3),
    "Kraft below one": (framed([2, 0, 1, 0], [4], "10 0 0"), 3),
    "Kraft above one": (framed([1, 1, 1, 0], [3], "0 1 0"), 3),
    "Kraft far above one": (framed([1, 1, 1, 1], [3], "0 1 0"), 3),
    "symbol that does not occur": (framed([2, 2, 1, 0], [4], "0 10 0"), 3),
    "not the best lengths": (framed([1, 2, 2, 0], [5], "10 10 0"), 3),
    "run lengths cut short": (bit_string([1, 1, 0, 0], 4) + b"\3", 3),
    "codes cut short": (framed([1, 1, 0, 0], [3], ""), 3),
    "fewer bits than codes": (framed([1, 1, 0, 0], [2], "01"), 3),
    "more bits than codes": (framed([1, 1, 0, 0], [4], "0100"), 3),
    "largest run": (framed([1, 1, 0, 0], [(1 << 14) - 1], "01" * 4096), 3),
    "bits behind the last code": (framed([1, 1, 0, 0], [3], "0101"), 3),
    "bits behind the last run length": (bit_string([1, 1, 0, 0], 4) + bytes([3, 0x40]) + bits("010"), 3),
    "bits behind the last length": (bytes([0x11, 0x10]) + bit_string([3], 14) + bits("010"), 3),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_written_is_refused(what: str) -> None:
    data, count = HOSTILE[what]
    num_codes = 3 if what == "bits behind the last length" else 4
    assert decode(framed([1, 1, 0], [3], "010"), 3, 3) == [0, 1, 0]
    with pytest.raises(FrameError, match="Kraft's sum" if what.startswith("Kraft") else None):
        decode(data, count, num_codes)
    assert outcome(data, count, num_codes, 0) == outcome(data, count, num_codes, 1)


def test_codes_that_cannot_be_there_cost_no_memory() -> None:
    count = 1 << 26
    data = bit_string([1, 1], 4) + bytes(14 * count // RUN_CODES // 8)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="at least a bit in 0 bits"):
            decode(data, count, 2)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < count // 16


def test_runs_that_end_elsewhere_are_refused_though_their_sum_is_right() -> None:
    codes = skewed(3 * RUN_CODES, 4, 0.5)
    data = encode(codes, 4)
    lengths, rest = data[:2], data[2:]
    run_bits = numbers(rest[:6], 14)[:3]
    for moved in (-1, 1):
        wrong = bit_string([run_bits[0] + moved, run_bits[1] - moved, run_bits[2]], 14)
        with pytest.raises(FrameError, match="does not end where"):
            decode(lengths + wrong + rest[6:], codes.size, 4)


def test_lengths_of_other_codes_are_refused_though_they_decode() -> None:
    # Symbols 0 and 1 swapped: complete, decodable, and longer than need be.
    right = encode([0, 0, 0, 1, 2], 3)
    assert right == framed([1, 2, 2], [7], "0 0 0 10 11")
    with pytest.raises(FrameError, match="not those of the codes"):
        decode(framed([2, 1, 2], [9], "10 10 10 0 11"), 5, 3)


@given(data=st.data())
def test_flips_and_cuts_give_codes_or_a_frame_error_and_no_codes_have_two_spellings(data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 5), max_size=80))
    written = bytearray(encode(codes, 6))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, 8 * len(written) - 1))
        written[at // 8] ^= 1 << at % 8
    else:
        del written[data.draw(st.integers(0, len(written) - 1)) :]
    try:
        found = decode(bytes(written), len(codes), 6)
    except FrameError:
        return
    assert encode(found, 6) == written


@given(st.binary(max_size=60), st.integers(0, 3000))
def test_random_bytes_give_codes_in_range_or_a_frame_error(data: bytes, count: int) -> None:
    try:
        found = decode(data, count, 6)
    except FrameError:
        return
    assert len(found) == count
    assert max(found, default=0) < 6


def test_quantiser_of_more_codes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="huffman writes at most 256 different codes, bf16 has 65536"):
        build_pipeline([{"codec": "bf16"}, {"codec": "huffman"}])
