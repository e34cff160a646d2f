"""k-means against Lloyd's algorithm done by the book, in fractions, on unsorted points."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from fedcodec import build_pipeline
from fedcodec.bits import packed_bytes
from fedcodec.quantisers.kmeans import KMeans, lloyd
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.layout import Vector

RNG = np.random.default_rng(0)
NAN = bytes.fromhex("0000c07f")


def f32(values: Sequence[float]) -> Vector:
    return np.array(values, dtype=np.float32)


def heavy(num_values: int, seed: int) -> Vector:
    return (np.random.default_rng(seed).standard_t(2, num_values) * 1e-3).astype(np.float32)


def decode(stage: KMeans, values: Vector, num_zeros: int) -> tuple[Vector, float]:
    """Return what the values decode to, and what the zeros do."""
    coded = stage.encode(values, num_zeros, RNG)
    assert coded.keep_n is not None
    table = stage.read_table(Reader(coded.table), coded.codes_n.size)
    decoded = np.full(values.size, stage.rest(table), np.float32)
    decoded[coded.keep_n] = stage.decode(coded.codes_n, table, 0).values_n
    return decoded, stage.rest(table)


def by_the_book(values: Vector, num_zeros: int, stage: KMeans) -> tuple[list[float], float]:
    points = [Fraction(float(value)) for value in values]
    everything = points + [Fraction(0)] * num_zeros
    low, high, k = min(everything), max(everything), stage.clusters
    centroids = [low + (high - low) * Fraction(index, k - 1) for index in range(k)]

    def nearest(point: Fraction) -> int:
        return min(range(k), key=lambda index: (abs(point - centroids[index]), index))

    is_pinned = stage.exact_zero and num_zeros > 0
    if is_pinned:
        centroids[nearest(Fraction(0))] = Fraction(0)
    labels: list[int] = []
    for _ in range(stage.iterations):
        labels = [nearest(point) for point in everything]
        zero = nearest(Fraction(0))
        for index in range(k):
            members = [point for point, label in zip(everything, labels, strict=True) if label == index]
            if members:
                centroids[index] = sum(members, Fraction(0)) / len(members)
        if is_pinned:
            centroids[zero] = Fraction(0)
    found = [float(centroids[label]) for label in labels]
    return found[: len(points)], found[-1]


@given(
    num_values=st.integers(1, 60),
    num_zeros=st.integers(0, 40),
    clusters=st.integers(2, 9),
    iterations=st.integers(1, 6),
    exact_zero=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_values_become_the_means_that_lloyd_finds(
    num_values: int, num_zeros: int, clusters: int, iterations: int, exact_zero: bool, seed: int
) -> None:
    stage = KMeans(clusters=clusters, iterations=iterations, exact_zero=exact_zero)
    values = heavy(num_values, seed)
    decoded, of_zeros = decode(stage, values, num_zeros)
    expected, expected_of_zeros = by_the_book(values, num_zeros, stage)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-12)
    if num_zeros:
        assert of_zeros == pytest.approx(expected_of_zeros, rel=1e-6, abs=1e-12)
        assert not exact_zero or of_zeros == 0
    assert np.unique(decoded).size <= clusters


@given(num_zeros=st.integers(0, 300), clusters=st.integers(2, 20), pinned=st.booleans(), seed=st.integers(0, 1 << 32))
def test_more_iterations_never_lose_more(num_zeros: int, clusters: int, pinned: bool, seed: int) -> None:
    values = heavy(200, seed)
    lost = []
    for iterations in range(1, 10):
        decoded, of_zeros = decode(
            KMeans(clusters=clusters, iterations=iterations, exact_zero=pinned), values, num_zeros
        )
        lost.append(np.sum((decoded.astype(float) - values) ** 2) + num_zeros * of_zeros**2)
    assert (np.diff(lost) <= 1e-6 * lost[0]).all()
    assert lost[0] < np.sum(values.astype(float) ** 2)


def test_every_centroid_is_the_mean_of_its_cluster_beside_an_outlier_too() -> None:
    values = np.sort(np.append(heavy(1000, 3), f32([-1e30, 1e30, 1e30])))
    found = lloyd(values, 500, 5, 4, exact_zero=False)
    labels = np.searchsorted(found.bounds, np.append(values, np.zeros(500, np.float32)))
    points = np.append(values, np.zeros(500, np.float32)).astype(float)
    for label in np.unique(labels):
        assert found.centroids_k[label] == pytest.approx(points[labels == label].mean(), rel=1e-12)
        assert found.sizes_k[label] == np.sum(labels == label)
    assert found.sizes_k.sum() == points.size


@pytest.mark.parametrize("num_zeros", [0, 1, 100])
@pytest.mark.parametrize(
    "values", [[], [0.0], [-0.0, -0.0], [2.5], [2.5] * 9, [1.0, 2.0], [-3e38, 3e38], [1e-45, -1e-45], [0.0, 7.0]]
)
def test_few_different_values_stay_what_they_are(values: list[float], num_zeros: int) -> None:
    decoded, of_zeros = decode(KMeans(clusters=256), f32(values), num_zeros)
    np.testing.assert_array_equal(decoded, f32(values))
    assert of_zeros == 0 or not num_zeros


def test_what_went_through_once_goes_through_unchanged() -> None:
    once, _ = decode(KMeans(), heavy(500, 1), 100)
    twice, _ = decode(KMeans(), once, 100)
    np.testing.assert_array_equal(once, twice)


def test_largest_cluster_is_not_sent_and_codes_skip_it() -> None:
    coded = KMeans(clusters=3).encode(f32([1, 9, 5, 5, 5]), 0, RNG)
    assert coded.keep_n is not None
    np.testing.assert_array_equal(coded.keep_n, [0, 1])
    np.testing.assert_array_equal(coded.codes_n, [0, 1])
    assert coded.table == struct.pack("<3f", 1, 9, 5)


def test_cluster_of_the_zeros_is_not_sent_even_if_another_is_larger() -> None:
    decoded, of_zeros = decode(KMeans(clusters=2), f32([5, 5, 5, 1]), 2)
    np.testing.assert_array_equal(decoded, f32([5, 5, 5, 0]))
    assert of_zeros == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_makes_all_of_them_nan(bad: float) -> None:
    pipeline = build_pipeline([{"codec": "top-k", "fraction": 0.5}, {"codec": "kmeans"}])
    frame = pipeline.encode(f32([1, bad, 2, 3]), RNG)
    assert np.isnan(pipeline.decode(frame, 4)).all()
    assert frame[8:] == b"\0" + 3 * NAN


@pytest.mark.parametrize(
    ("table", "count"),
    [
        (3 * NAN, 1),
        (2 * NAN + struct.pack("<f", 0), 0),
        (bytes.fromhex("0000c0ff") * 3, 0),
        (struct.pack("<3f", 2, 1, 0), 1),
        (struct.pack("<3f", 1, np.inf, 0), 1),
        (struct.pack("<3f", 1, 2, -np.inf), 1),
        (struct.pack("<3f", -0.0, 2, 1), 1),
        (struct.pack("<3f", 1, 2, -0.0), 1),
        (struct.pack("<2f", 1, 2), 1),
    ],
)
def test_table_that_encoding_does_not_write_is_refused(table: bytes, count: int) -> None:
    with pytest.raises(FrameError, match="centroid"):
        KMeans().read_table(Reader(table), count)


@pytest.mark.parametrize(("positions", "expected_ratio"), [("fixed-positions", 7.62), ("rice", 34.09)])
def test_fedzip_of_gaussian_values_is_as_small_as_theory_says(positions: str, expected_ratio: float) -> None:
    """One in five is sent, with a bit for which of two: 20 bits a position, or 3.694 at the best Rice parameter."""
    stages: list[dict[str, JsonValue]] = [{"codec": "per-tensor"}, {"codec": "top-k", "fraction": 0.2}]
    stages += [{"codec": "kmeans"}, {"codec": positions}]
    pipeline = build_pipeline(stages)
    values = np.random.default_rng(1).standard_normal(10**6).astype(np.float32)
    frame = pipeline.encode(values, RNG)
    assert values.nbytes / len(frame) == pytest.approx(expected_ratio, rel=2e-3)
    if positions == "fixed-positions":
        assert len(frame) == 12 + 1 + 3 + 12 + packed_bytes(200_000, 20) + packed_bytes(200_000, 1)
    decoded = pipeline.decode(frame, values.size)
    assert np.unique(decoded).size == 3
    assert np.linalg.norm(decoded - values) / np.linalg.norm(values) == pytest.approx(0.62, abs=0.005)
