"""Ranks against counting, against Python's own sorting, and against the sizes that follow from a network's layers."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedagg.base import Capacity
from fedagg.weighted_mean import WeightedMean
from fedcodec import Pipeline, build_pipeline
from fedcodec.base import Codes
from fedcodec.quantisers.ranks import MAX_RANKED, Ranks
from fedcodec.reader import Reader
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector

RNG = np.random.default_rng(0)
CONV8 = (1728, 36_864, 73_728, 147_456, 294_912, 589_824, 1_179_648, 2_359_296, 524_288, 65_536, 2560)
LENET = (288, 18_432, 1_605_632, 1280)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38])
scores = st.lists(few, min_size=1, max_size=60) | st.lists(finite, min_size=1, max_size=60)


def f32(values: list[float]) -> Vector:
    return np.array(values, dtype=np.float32)


def codes_of(values: Vector) -> Codes:
    coded = Ranks().encode(values, 0, RNG)
    assert coded.table == b"\0"
    assert coded.keep_n is None
    return coded.codes_n


def pipeline(*stages: str | dict[str, JsonValue]) -> Pipeline:
    return build_pipeline([{"codec": stage} if isinstance(stage, str) else stage for stage in stages])


def top(fraction: float) -> dict[str, JsonValue]:
    return {"codec": "top-k", "fraction": fraction}


def frame_of(codes: list[int], num_values: int, first: int = 0) -> bytes:
    """Return a frame of these codes, right or wrong, by docs/wire-format.md."""
    width = (num_values - 1).bit_length()
    bits = sum(code << width * index for index, code in enumerate(codes))
    return b"RTF1\1\x27" + bytes([num_values, first]) + bits.to_bytes(math.ceil(width * len(codes) / 8), "little")


@given(scores=scores)
def test_rank_counts_what_is_smaller_and_what_is_equal_and_comes_before(scores: list[float]) -> None:
    values = f32(scores)
    counted = [
        sum(other < value or (other == value and j < i) for j, other in enumerate(scores))
        for i, value in enumerate(scores)
    ]
    assert codes_of(values).tolist() == counted
    decoded = pipeline("ranks").decode(pipeline("ranks").encode(values, RNG), values.size)
    assert decoded.tolist() == [rank + 1 for rank in counted]


@given(scores=scores)
def test_codes_are_the_order_of_the_order_and_a_permutation(scores: list[float]) -> None:
    order = sorted(range(len(scores)), key=scores.__getitem__)  # stable
    codes = codes_of(f32(scores)).tolist()
    assert codes == sorted(range(len(order)), key=order.__getitem__)
    assert [order[code] for code in codes] == list(range(len(scores)))


@pytest.mark.parametrize("num_values", [1, 2, 3, 255, 256, 257, 65_535, 65_536, 65_537, 300_000])
def test_codes_have_the_smallest_type_and_width(num_values: int) -> None:
    values = np.random.default_rng(num_values).standard_normal(num_values).astype(np.float32)
    codes = codes_of(values)
    assert codes.itemsize == (1 if num_values <= 1 << 8 else 2 if num_values <= 1 << 16 else 4)
    frame = pipeline("ranks").encode(values, RNG)
    header = 6 + (1 if num_values < 1 << 7 else 2 if num_values < 1 << 14 else 3)
    assert len(frame) == header + 1 + math.ceil(num_values * math.ceil(math.log2(num_values)) / 8)
    assert len(frame) == pipeline("ranks").max_frame_bytes(num_values)
    (part,) = pipeline("ranks").open(frame, num_values)
    np.testing.assert_array_equal(part.values_n[np.argsort(values, kind="stable")], np.arange(1, num_values + 1))


def test_worked_example_of_three_voters() -> None:
    """Positions, not orders, are summed; edges by their sums are 0, 3, 1, 2."""
    votes = [[0.1, -0.4, 0.9, 0.3], [0.2, 0.5, 0.7, -0.1], [-0.3, 0.6, 0.8, 0.4]]
    assert [codes_of(f32(each)).tolist() for each in votes] == [[1, 0, 3, 2], [1, 2, 3, 0], [0, 2, 3, 1]]
    fold = WeightedMean().open(4, Capacity(max_updates=3, max_weight=1, max_abs=4.0))
    for each in votes:
        fold.add(pipeline("ranks").open(pipeline("ranks").encode(f32(each), RNG), 4), 1)
    (mean,) = fold.mean_blocks()
    assert np.rint(3 * mean - 3).tolist() == [2, 4, 9, 3]
    assert np.argsort(mean, kind="stable").tolist() == [0, 3, 1, 2]


@given(votes=st.integers(1, 9).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=1, max_size=7)))
def test_sum_of_codes_decodes_to_the_sum_of_values(votes: list[list[int]]) -> None:
    size, voters = len(votes[0]), len(votes)
    decoded = [pipeline("ranks").decode(pipeline("ranks").encode(f32([*map(float, v)]), RNG), size) for v in votes]
    total = np.sum(decoded, axis=0)
    np.testing.assert_array_equal(total, np.sum(votes, axis=0) + voters)
    assert total.sum() == voters * size * (size + 1) / 2


@pytest.mark.parametrize(
    ("sizes", "mebibytes"), [(CONV8, 13.069), (LENET, 4.054)], ids=["Conv8 on CIFAR-10", "LeNet on MNIST"]
)
def test_ranking_of_a_network_takes_two_thirds_of_its_float32(sizes: tuple[int, ...], mebibytes: float) -> None:
    ranking = pipeline("per-tensor", "ranks")
    values = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32)
    frame = ranking.encode(values, RNG, sizes)
    # Beside the ranks: a header, and two bytes for each layer.
    payload = sum(math.ceil(size * math.ceil(math.log2(size)) / 8) for size in sizes)
    assert len(frame) == payload + 7 + 4 + 2 * len(sizes) - (sum(sizes) < 1 << 21)
    assert len(frame) / 2**20 == pytest.approx(mebibytes, abs=5e-4)
    decoded = ranking.decode(frame, sizes)
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        order = np.argsort(values[start : start + size], kind="stable")
        np.testing.assert_array_equal(decoded[start : start + size][order], np.arange(1, size + 1))


@given(scores=st.lists(finite, min_size=1, max_size=60), fraction=st.floats(0.01, 1))
def test_list_of_the_largest_ranks_them_and_leaves_the_others_at_zero(scores: list[float], fraction: float) -> None:
    values, sparse = f32(scores), pipeline(top(fraction), "ranks", "rice")
    frame = sparse.encode(values, RNG)
    kept = sorted(range(len(scores)), key=lambda at: (-abs(scores[at]), at))[: math.ceil(fraction * len(scores))]
    expected = [0] * len(scores)
    for rank, at in enumerate(sorted(kept, key=lambda at: (scores[at], at)), 1):
        expected[at] = rank
    assert sparse.decode(frame, values.size).tolist() == expected
    assert len(frame) <= sparse.max_frame_bytes(values.size)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_sparse_list_takes_a_bit_more_for_each_edge_than_their_numbers_in_order(fraction: float) -> None:
    size = 589_824
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    frame = pipeline(top(fraction), "ranks", "rice").encode(values, RNG)
    kept = math.ceil(fraction * size)
    positions = -size * (fraction * math.log2(fraction) + (1 - fraction) * math.log2(1 - fraction))
    assert positions < 8 * len(frame) - kept * math.ceil(math.log2(kept)) < 1.03 * positions + 160
    assert 8 * len(frame) < kept * (math.ceil(math.log2(size)) + 1) + 160


@given(codes=st.integers(2, 40).flatmap(lambda n: st.permutations(range(n))), data=st.data())
def test_any_other_code_in_one_place_is_refused(codes: list[int], data: st.DataObject) -> None:
    size = len(codes)
    assert pipeline("ranks").decode(frame_of(codes, size), size).tolist() == [code + 1 for code in codes]
    at = data.draw(st.integers(0, size - 1))
    width = (size - 1).bit_length()
    codes[at] = data.draw(st.integers(0, (1 << width) - 1).filter(lambda code: code != codes[at]))
    with pytest.raises(FrameError, match=r"occurs twice|below \d+"):
        pipeline("ranks").decode(frame_of(codes, size), size)


@given(codes=st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
@example(codes=[0])
@example(codes=[0, 0])
def test_permutations_and_nothing_else_decode(codes: list[int]) -> None:
    frame, size = frame_of(codes, len(codes)), len(codes)
    if sorted(codes) == list(range(size)):
        decoded = pipeline("ranks").decode(frame, size)
        assert pipeline("ranks").encode(decoded, RNG) == frame
    else:
        with pytest.raises(FrameError, match="occurs twice"):
            pipeline("ranks").decode(frame, size)


@functools.cache
def sparse_frame() -> bytes:
    values = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    return pipeline("per-tensor", top(0.4), "ranks", "rice").encode(values, RNG, (20, 30))


def test_every_cut_and_flipped_bit_is_refused_or_another_list() -> None:
    stages, frame = pipeline("per-tensor", top(0.4), "ranks", "rice"), sparse_frame()
    seen = {stages.decode(frame, (20, 30)).tobytes()}
    for end in range(len(frame)):
        with pytest.raises(FrameError):
            stages.decode(frame[:end], (20, 30))
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decoded = stages.decode(bytes(damaged), (20, 30))
        except FrameError:
            continue
        # Other positions, the same ranks: 1 to k in each tensor.
        for tensor in (decoded[:20], decoded[20:]):
            assert sorted(tensor[tensor > 0]) == list(range(1, 1 + np.count_nonzero(tensor)))
        assert decoded.tobytes() not in seen
        seen.add(decoded.tobytes())


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_shows_in_its_tensor_and_no_other(bad: float) -> None:
    ranking = pipeline("per-tensor", "ranks")
    sizes = (3, 1, 2)
    for at in range(6):
        values = f32([3, 1, 2, 5, 7, 6])
        values[at] = bad
        decoded = ranking.decode(ranking.encode(values, RNG, sizes), sizes)
        tensor = 0 if at < 3 else 1 if at < 4 else 2
        expected = [[3.0, 1.0, 2.0], [1.0], [2.0, 1.0]]
        expected[tensor] = [math.nan] * sizes[tensor]
        np.testing.assert_array_equal(decoded, np.concatenate(expected))


@pytest.mark.parametrize(
    ("frame", "num_values", "text"),
    [
        (frame_of([1, 0], 2, first=1), 2, "a rank of values that are not finite"),
        (frame_of([0, 1], 2, first=2), 2, "ranks of 2 values begin with 2"),
        (frame_of([0, 1], 2, first=255), 2, "ranks of 2 values begin with 255"),
        (frame_of([0, 1, 3], 3), 3, "code 3: below 3"),
        (frame_of([0, 1, 1], 3), 3, "no value has rank 2"),
        (frame_of([0, 1], 2)[:-1] + b"\6", 2, "bits behind"),
    ],
)
def test_what_is_not_written_is_refused_with_a_sentence(frame: bytes, num_values: int, text: str) -> None:
    with pytest.raises(FrameError, match=text):
        pipeline("ranks").decode(frame, num_values)


def test_vote_is_never_sent_as_it_is_nor_is_nothing_not_finite() -> None:
    with pytest.raises(FrameError, match="ranks does not allow"):
        pipeline("per-tensor", "ranks").decode(b"RTF1\2\x0a\x27\1\1" + f32([1.0]).tobytes()[:1], 1)
    with pytest.raises(FrameError, match="ranks of 0 values begin with 1"):
        Ranks().read_table(Reader(b"\1"), 0)
    assert Ranks().decode(codes_of(f32([])), Ranks().read_table(Reader(b"\0"), 0), 0).values_n.size == 0


def test_more_than_float32_counts_are_refused_before_they_are_looked_at() -> None:
    too_many = np.broadcast_to(np.float32(0), MAX_RANKED + 1)
    with pytest.raises(InvalidInput, match="ranks of 16777217 values of one tensor, at most 16777216"):
        Ranks().encode(too_many, 0, RNG)
    with pytest.raises(FrameError, match="ranks of 16777217 values of one tensor, at most 16777216"):
        pipeline("ranks").decode(b"RTF1\1\x27\x81\x80\x80\x08" + b"\0", MAX_RANKED + 1)
    assert np.float32(MAX_RANKED) == MAX_RANKED != np.float32(MAX_RANKED + 1) - 1


def test_many_codes_need_a_coder_of_many() -> None:
    with pytest.raises(InvalidInput, match="huffman writes at most 256 different codes, ranks has 4294967296"):
        pipeline("ranks", "huffman")


def test_only_ranks_are_votes() -> None:
    assert pipeline("per-tensor", top(0.1), "ranks", "zstd").traits.votes
    assert not pipeline("per-tensor", top(0.1), "sign", "zstd").traits.votes
