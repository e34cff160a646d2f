"""One-dimensional k-means, as in FedZip, and with as many clusters as pay.

Shape legend: n values, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedcodec.base import Coded, Codes, Decoded, Kind, Positions, Traits, TraitsByParameters
from fedcodec.reader import Reader
from fedcore.draws import Draws
from fedcore.errors import FrameError
from fedcore.layout import Vector
from fedcore.plugin import Plugin

NAN_BYTES: Final = bytes.fromhex("0000c07f")
"""The NaN of tables: what was encoded held a value that is not finite, and decodes to NaN."""


_Iterations = Annotated[int, Field(ge=1, le=100, description="Iterations of Lloyd's algorithm.")]
_ExactZero = Annotated[
    bool, Field(description="Whether zeros left out before stay exactly zero, and with them their cluster.")
]


class _KMeans(Plugin):
    """Replaces each value by the mean of its cluster, and does not send which ones are in the largest.

    The zeros that a selector left out count as one point of their weight. They decode to `rest`, so if there are any
    it is their cluster that is not sent, the largest or not.

    The start has a centroid at the value of largest magnitude, and no iteration loses more than the one before, so
    less than everything is lost.
    """

    kind: ClassVar[Kind] = "quantise"
    # Means make no vector longer; rounding them to float32 does, by up to one part in 2^24.
    # Without an exact zero, what a selector left out decodes to something else, and may be farther off than it was.
    traits: ClassVar = TraitsByParameters(lambda stage: Traits(contraction=stage.exact_zero, changes_sensitivity=True))
    drops: ClassVar[bool] = True
    may_send_as_is: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def decode(self, codes: Codes, table: Vector, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        return Decoded(codes, table[:-1])

    def rest(self, table: Vector) -> float:
        """See `Quantiser.rest`: the mean of the cluster that is not sent."""
        return float(table[-1])


class KMeans(_KMeans):
    """k-means with a fixed number of clusters. Malekijoo et al., FedZip, 2021."""

    name: ClassVar[str] = "kmeans"
    wire_id: ClassVar[int] = 31

    clusters: Annotated[int, Field(ge=2, le=256, description="How many different values there are after it.")] = 3
    iterations: _Iterations = 4
    exact_zero: _ExactZero = True

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`: one cluster is not sent."""
        return self.clusters - 1

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing. With a value that is not finite nothing is sent but NaNs."""
        sorted_n = _sorted(values_n)
        if sorted_n is None:
            return _nothing(self.clusters)
        return _coded(values_n, num_zeros, lloyd(sorted_n, num_zeros, self.clusters, self.iterations, self.exact_zero))

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 4 * self.clusters

    def read_table(self, reader: Reader, num_values: int) -> Vector:
        """See `Quantiser.read_table`: the centroids that codes are of, then `rest`."""
        return _read_centroids(reader, self.clusters, num_values == 0)


class KMeansAuto(_KMeans):
    """k-means with the number of clusters at which error and bytes together cost least, see `cheapest`.

    Codes are written as if all of `max_clusters` were used; `huffman` takes no bits for those that are not.
    """

    name: ClassVar[str] = "kmeans-auto"
    wire_id: ClassVar[int] = 38

    max_clusters: Annotated[int, Field(ge=2, le=256, description="How many different values there are at most.")] = 16
    price: Annotated[
        float,
        Field(gt=0, le=1000, description="Squared error that a bit must save, in units of the values' mean square."),
    ] = 0.1
    iterations: _Iterations = 4
    exact_zero: _ExactZero = True

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`: one cluster is not sent."""
        return self.max_clusters - 1

    def encode(self, values_n: Vector, num_zeros: int, rng: Draws) -> Coded:
        """See `Quantiser.encode`; draws nothing. With a value that is not finite nothing is sent but two NaNs."""
        sorted_n = _sorted(values_n)
        if sorted_n is None:
            coded = _nothing(2)
        else:
            tried = [
                lloyd(sorted_n, num_zeros, clusters, self.iterations, self.exact_zero)
                for clusters in range(2, self.max_clusters + 1)
            ]
            coded = _coded(values_n, num_zeros, cheapest(tried, sorted_n, self.price))
        return coded._replace(table=bytes([len(coded.table) // 4 - 1]) + coded.table)

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 1 + 4 * self.max_clusters

    def read_table(self, reader: Reader, num_values: int) -> Vector:
        """See `Quantiser.read_table`: how many centroids codes are of, these, then `rest`."""
        num_sent = reader.take(1, "number of centroids")[0]
        if not 1 <= num_sent < self.max_clusters:
            raise FrameError(f"{num_sent} centroids for codes, from 1 to {self.max_clusters - 1}")
        return _read_centroids(reader, num_sent + 1, num_values == 0 and num_sent == 1)

    def decode(self, codes: Codes, table: Vector, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        if codes.size and codes.max() >= table.size - 1:
            raise FrameError(f"code {codes.max()}: there are {table.size - 1} centroids")
        return super().decode(codes, table, start)


def _sorted(values_n: Vector) -> Vector | None:
    """Return the values in ascending order, or None if one is not finite."""
    sorted_n = np.sort(values_n)  # a NaN comes last
    return sorted_n if np.isfinite(sorted_n[:1]).all() and np.isfinite(sorted_n[-1:]).all() else None


def _nothing(clusters: int) -> Coded:
    return Coded(np.zeros(0, np.uint8), clusters * NAN_BYTES, np.zeros(0, np.int64))


def _coded(values_n: Vector, num_zeros: int, found: Clusters) -> Coded:
    unsent = found.zero if num_zeros else int(np.argmax(found.sizes_k))
    labels_n = np.searchsorted(found.bounds, values_n).astype(np.uint8)
    keep_n: Positions = np.flatnonzero(labels_n != unsent)
    codes_n = labels_n[keep_n]
    codes_n -= codes_n > unsent
    table_k = np.append(np.delete(found.centroids_k, unsent), found.centroids_k[unsent]).astype("<f4")
    table_k += np.float32(0)  # turns −0 into 0
    return Coded(codes_n, table_k.tobytes(), keep_n)


def _read_centroids(reader: Reader, clusters: int, may_be_nan: bool) -> Vector:
    data = reader.take(4 * clusters, "centroids")
    table_k: Vector = np.frombuffer(data, dtype="<f4")
    if may_be_nan and data == clusters * NAN_BYTES:
        return table_k
    if not np.isfinite(table_k).all() or (np.signbit(table_k) & (table_k == 0)).any():
        raise FrameError("a centroid is not finite, or minus zero")
    if (table_k[1:-1] < table_k[:-2]).any():
        raise FrameError("centroids are not ascending")
    return table_k


class Clusters(NamedTuple):
    """Clusters of a line's points, in ascending order.

    Attributes:
        centroids_k: their means; an empty one has the centroid that it had before.
        sizes_k: how many points each has.
        bounds: k − 1 of them; a point is in the cluster whose number is how many bounds lie below it.
        zero: the number of the cluster that zeros are in.
    """

    centroids_k: npt.NDArray[np.float64]
    sizes_k: npt.NDArray[np.int64]
    bounds: Vector
    zero: int


def cheapest(tried: Sequence[Clusters], sorted_n: Vector, price: float) -> Clusters:
    """Return those clusters at which D + λR is least, of equal ones the first.

    Chou, Lookabaugh, Gray: Entropy-Constrained Vector Quantization, 1989, where λ is a slope of the rate-distortion
    function as it is here. D is the squared error; R are the bits of the centroids and the entropy of which cluster
    each point is in, positions and codes together. λ is `price` times the mean square of the values: what a bit
    must save.

    All D are the points' square sum less Σ size · centroid², for each centroid is its cluster's mean, or 0. So that is
    what is compared.

    Args:
        tried: of the same points.
        sorted_n: the values among them, without the zeros left out before.
        price: above 0.
    """
    square_sum = float(np.einsum("n,n->", sorted_n, sorted_n, dtype=np.float64))
    bit_error = price * square_sum / max(1, sorted_n.size)

    def saved(found: Clusters) -> float:
        return float(found.sizes_k @ np.square(found.centroids_k)) - bit_error * num_bits(found)

    return max(tried, key=saved)


def num_bits(found: Clusters) -> float:
    """Return 32 bits for each centroid and the entropy of the points' clusters, of all points together."""
    sizes = found.sizes_k[found.sizes_k > 0]
    return 32 * found.sizes_k.size + float(sizes @ np.log2(sizes.sum() / sizes))


def lloyd(sorted_n: Vector, num_zeros: int, clusters: int, iterations: int, exact_zero: bool) -> Clusters:
    """Return what Lloyd's algorithm finds from evenly spread centroids.

    The points are on a line, so a cluster is a slice of the sorted ones. Its sum is taken anew each time: that is one
    pass over them, much less than sorting, and unlike the difference of two prefix sums it is right beside an outlier.

    Args:
        sorted_n: ascending and finite.
        num_zeros: how many zeros there are besides.
        clusters: k.
        iterations: at least 1.
        exact_zero: whether the centroid of the cluster with those zeros is 0 from the start on.
    """
    ends = [float(value) for value in (*sorted_n[:1], *sorted_n[-1:])]
    if num_zeros or not ends:
        ends.append(0.0)
    centroids_k = np.linspace(min(ends), max(ends), clusters)
    is_pinned = exact_zero and num_zeros > 0
    if is_pinned:
        centroids_k[_label_of_zero(_bounds(centroids_k))] = 0.0
    found = _iterate(sorted_n, num_zeros, centroids_k, is_pinned)
    for _ in range(iterations - 1):
        found = _iterate(sorted_n, num_zeros, found.centroids_k, is_pinned)
    return found


def _iterate(sorted_n: Vector, num_zeros: int, centroids_k: npt.NDArray[np.float64], is_pinned: bool) -> Clusters:
    bounds = _bounds(centroids_k)
    slices = np.split(sorted_n, np.searchsorted(sorted_n, bounds, side="right"))
    zero = _label_of_zero(bounds)
    sizes_k = np.array([each.size for each in slices], dtype=np.int64)
    sizes_k[zero] += num_zeros
    sums_k = np.array([each.sum(dtype=np.float64) for each in slices])
    means_k = np.where(sizes_k > 0, sums_k / np.maximum(sizes_k, 1), centroids_k)
    if is_pinned:
        means_k[zero] = 0.0
    return Clusters(means_k, sizes_k, bounds, zero)


def _bounds(centroids_k: npt.NDArray[np.float64]) -> Vector:
    """Return the midpoints, each as the largest float32 that is not above it: values compare with it as with that."""
    middles = (centroids_k[:-1] + centroids_k[1:]) / 2
    bounds: Vector = middles.astype(np.float32)
    return np.where(bounds > middles, np.nextafter(bounds, np.float32(-np.inf)), bounds)


def _label_of_zero(bounds: Vector) -> int:
    return int(np.searchsorted(bounds, np.float32(0)))
