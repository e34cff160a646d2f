"""How many clusters kmeans-auto takes, against the objective of docs/wire-format.md computed point by point."""

from __future__ import annotations

import struct
from math import log2

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedcodec import build_pipeline
from fedcodec.quantisers.kmeans import KMeansAuto, lloyd
from fedcodec.reader import Reader
from fedcore.errors import FrameError, InvalidInput
from fedcore.layout import Vector

RNG = np.random.default_rng(0)
NAN = bytes.fromhex("0000c07f")


def heavy(num_values: int, seed: int) -> Vector:
    return (np.random.default_rng(seed).standard_t(3, num_values) * 1e-3).astype(np.float32)


def clusters_of(stage: KMeansAuto, values: Vector, num_zeros: int) -> int:
    return stage.encode(values, num_zeros, RNG).table[0] + 1


def error_and_bits(stage: KMeansAuto, values: Vector, num_zeros: int, clusters: int) -> tuple[float, float]:
    """Return D and R, each point and its cluster looked at by itself."""
    found = lloyd(np.sort(values), num_zeros, clusters, stage.iterations, stage.exact_zero)
    points: list[float] = np.append(values, np.zeros(num_zeros, np.float32)).tolist()
    labels = [int(np.count_nonzero(found.bounds < np.float32(point))) for point in points]
    errors = [point - float(found.centroids_k[label]) for point, label in zip(points, labels, strict=True)]
    num_bits = 32 * clusters + sum(log2(len(points) / labels.count(label)) for label in labels)
    return sum(error * error for error in errors), num_bits


def mean_square(values: Vector) -> float:
    squares: list[float] = np.square(values, dtype=np.float64).tolist()
    return sum(squares) / max(1, len(squares))


@given(
    num_values=st.integers(0, 80),
    num_zeros=st.integers(0, 200),
    max_clusters=st.integers(2, 12),
    price=st.floats(1e-5, 2),
    exact_zero=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_no_other_number_of_clusters_costs_less(
    num_values: int, num_zeros: int, max_clusters: int, price: float, exact_zero: bool, seed: int
) -> None:
    stage = KMeansAuto(max_clusters=max_clusters, price=price, exact_zero=exact_zero)
    values = heavy(num_values, seed)
    bit_error = price * mean_square(values)
    costs = {}
    for clusters in range(2, max_clusters + 1):
        squared_error, num_bits = error_and_bits(stage, values, num_zeros, clusters)
        costs[clusters] = squared_error + bit_error * num_bits
    taken = clusters_of(stage, values, num_zeros)
    assert costs[taken] <= min(costs.values()) * (1 + 1e-9)


@given(num_values=st.integers(3, 300), num_zeros=st.integers(0, 300), seed=st.integers(0, 1 << 32))
def test_third_cluster_is_taken_below_the_price_at_which_it_pays(num_values: int, num_zeros: int, seed: int) -> None:
    values = heavy(num_values, seed)
    (error_of_2, bits_of_2), (error_of_3, bits_of_3) = (
        error_and_bits(KMeansAuto(), values, num_zeros, clusters) for clusters in (2, 3)
    )
    price = (error_of_2 - error_of_3) / (bits_of_3 - bits_of_2) / mean_square(values)
    assume(1e-6 < price < 1000 and bits_of_3 > bits_of_2)
    for factor, clusters in ((1 - 1e-6, 3), (1 + 1e-6, 2)):
        assert clusters_of(KMeansAuto(max_clusters=3, price=price * factor), values, num_zeros) == clusters


@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_number_of_clusters_is_the_same_at_any_scale(scale: float) -> None:
    values = heavy(1000, 1)
    taken = [clusters_of(KMeansAuto(), (values * np.float32(by)).astype(np.float32), 500) for by in (1.0, scale)]
    assert taken[0] == taken[1] > 2


def test_clusters_are_fewer_at_a_higher_price() -> None:
    values = np.random.default_rng(2).standard_normal(20_000).astype(np.float32)
    prices = (0.001, 0.05, 0.1, 0.2, 0.3, 1000)
    taken = [clusters_of(KMeansAuto(price=price), values, 0) for price in prices]
    assert taken == sorted(taken, reverse=True)
    assert len(set(taken)) == len(taken)
    assert (taken[0], taken[-1]) == (16, 2)


@pytest.mark.parametrize("values", [[], [0.0], [0.0, -0.0, 0.0], [2.5], [2.5] * 50, [-3e38, 3e38]])
@pytest.mark.parametrize("num_zeros", [0, 1, 100])
def test_values_that_need_no_more_get_two_clusters(values: list[float], num_zeros: int) -> None:
    assert clusters_of(KMeansAuto(), np.array(values, np.float32), num_zeros) <= 3
    if len(set(map(abs, values))) <= 1 and (min(values, default=0) >= 0):
        assert clusters_of(KMeansAuto(), np.array(values, np.float32), num_zeros) == 2


def test_frame_is_that_of_kmeans_with_as_many_clusters_but_for_its_count() -> None:
    values = heavy(3000, 4)
    behind: list[dict[str, JsonValue]] = [{"codec": "rice"}, {"codec": "huffman"}]
    auto = build_pipeline([{"codec": "kmeans-auto", "price": 0.3}, *behind])
    clusters = clusters_of(KMeansAuto(price=0.3), values, 0)
    assert 3 < clusters < 16
    fixed = build_pipeline([{"codec": "kmeans", "clusters": clusters}, *behind])
    decoded = auto.decode(auto.encode(values, RNG), values.size)
    np.testing.assert_array_equal(fixed.decode(fixed.encode(values, RNG), values.size), decoded)
    # Huffman's table has four bits for each code that there might be.
    lengths = (15 + 1) // 2 - clusters // 2
    assert len(auto.encode(values, RNG)) == len(fixed.encode(values, RNG)) + 1 + lengths


def test_what_fedzip_throws_away_of_heavy_tails_is_kept() -> None:
    values = heavy(10**6, 5)
    errors = {}
    for codec in ("kmeans", "kmeans-auto"):
        stages: list[dict[str, JsonValue]] = [{"codec": "top-k", "fraction": 0.2}, {"codec": codec}]
        pipeline = build_pipeline([*stages, {"codec": "rice"}, {"codec": "huffman"}])
        frame = pipeline.encode(values, RNG)
        lost = pipeline.decode(frame, values.size) - values
        errors[codec] = float(np.linalg.norm(lost) / np.linalg.norm(values))
        assert values.nbytes / len(frame) > 60
    assert errors["kmeans"] > 0.95
    assert errors["kmeans-auto"] < 0.8


@pytest.mark.parametrize(
    ("table", "count"),
    [
        (b"", 1),
        (b"\0" + struct.pack("<f", 0), 0),
        (b"\4" + struct.pack("<5f", 1, 2, 3, 4, 0), 1),
        (b"\xff" + bytes(4 * 256), 1),
        (b"\3" + struct.pack("<3f", 1, 2, 0), 1),
        (b"\2" + struct.pack("<3f", 2, 1, 0), 1),
        (b"\2" + struct.pack("<3f", 1, np.inf, 0), 1),
        (b"\2" + struct.pack("<3f", 1, 2, -0.0), 1),
        (b"\1" + 2 * NAN, 1),
        (b"\2" + 3 * NAN, 0),
    ],
)
def test_table_that_encoding_does_not_write_is_refused(table: bytes, count: int) -> None:
    with pytest.raises(FrameError, match="centroid"):
        KMeansAuto(max_clusters=4).read_table(Reader(table), count)


def test_code_without_a_centroid_is_refused() -> None:
    pipeline = build_pipeline([{"codec": "kmeans-auto", "max_clusters": 9}])
    start = b"RTF1\1\x26\4\1"
    table = b"\2" + struct.pack("<3f", 1, 2, 0)
    np.testing.assert_array_equal(pipeline.decode(start + table + b"\3\1", 4), [0, 0, 0, 2])
    for code in range(2, 8):
        with pytest.raises(FrameError, match=f"code {code}: there are 2 centroids"):
            pipeline.decode(start + table + bytes([3, code]), 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_makes_all_of_them_nan(bad: float) -> None:
    pipeline = build_pipeline([{"codec": "top-k", "fraction": 0.5}, {"codec": "kmeans-auto"}])
    frame = pipeline.encode(np.array([1, bad, 2, 3], np.float32), RNG)
    assert np.isnan(pipeline.decode(frame, 4)).all()
    assert frame[8:] == b"\0\1" + 2 * NAN


@pytest.mark.parametrize("params", [{"max_clusters": 1}, {"max_clusters": 257}, {"price": 0}, {"price": 1001.0}])
def test_parameters_out_of_bounds_are_refused(params: dict[str, JsonValue]) -> None:
    with pytest.raises(InvalidInput, match=r"max_clusters|price"):
        KMeansAuto.configure(params)
