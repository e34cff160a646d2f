"""One-dimensional k-means, as in FedZip.

Shape legend: n values, k clusters.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedcodec.base import Coded, Codes, Decoded, Kind, Positions, Traits
from fedcodec.reader import Reader
from fedcore.errors import FrameError
from fedcore.layout import Vector
from fedcore.plugin import Plugin

NAN_BYTES: Final = bytes.fromhex("0000c07f")
"""The NaN of tables: what was encoded held a value that is not finite, and decodes to NaN."""


class KMeans(Plugin):
    """Replaces each value by the mean of its cluster, and does not send which ones are in the largest.

    Malekijoo et al., FedZip, 2021. The zeros that a selector left out count as one point of their weight. They decode
    to `rest`, so if there are any it is their cluster that is not sent, the largest or not.

    The start has a centroid at the value of largest magnitude, and no iteration loses more than the one before, so
    less than everything is lost.
    """

    name: ClassVar[str] = "kmeans"
    wire_id: ClassVar[int] = 31
    kind: ClassVar[Kind] = "quantise"
    # Means make no vector longer; rounding them to float32 does, by up to one part in 2^24.
    traits: ClassVar[Traits] = Traits(contraction=True, changes_sensitivity=True)
    drops: ClassVar[bool] = True
    may_send_as_is: ClassVar[bool] = True

    clusters: Annotated[int, Field(ge=2, le=256, description="How many different values there are after it.")] = 3
    iterations: Annotated[int, Field(ge=1, le=100, description="Iterations of Lloyd's algorithm.")] = 4
    exact_zero: Annotated[
        bool, Field(description="Whether zeros left out before stay exactly zero, and with them their cluster.")
    ] = True

    def num_codes(self, num_values: int) -> int:
        """See `Quantiser.num_codes`: one cluster is not sent."""
        return self.clusters - 1

    def encode(self, values_n: Vector, num_zeros: int, rng: np.random.Generator) -> Coded:
        """See `Quantiser.encode`; draws nothing. With a value that is not finite nothing is sent but NaNs."""
        sorted_n = np.sort(values_n)  # a NaN comes last
        if not np.isfinite(sorted_n[:1]).all() or not np.isfinite(sorted_n[-1:]).all():
            return Coded(np.zeros(0, np.uint8), self.clusters * NAN_BYTES, np.zeros(0, np.int64))
        found = lloyd(sorted_n, num_zeros, self.clusters, self.iterations, self.exact_zero)
        unsent = found.zero if num_zeros else int(np.argmax(found.sizes_k))
        labels_n = np.searchsorted(found.bounds, values_n).astype(np.uint8)
        keep_n: Positions = np.flatnonzero(labels_n != unsent)
        codes_n = labels_n[keep_n]
        codes_n -= codes_n > unsent
        table_k = np.append(np.delete(found.centroids_k, unsent), found.centroids_k[unsent]).astype("<f4")
        table_k += np.float32(0)  # turns −0 into 0
        return Coded(codes_n, table_k.tobytes(), keep_n)

    def max_table_bytes(self, num_values: int) -> int:
        """See `Quantiser.max_table_bytes`."""
        return 4 * self.clusters

    def read_table(self, reader: Reader, num_values: int) -> Vector:
        """See `Quantiser.read_table`: the centroids that codes are of, then `rest`."""
        data = reader.take(4 * self.clusters, "centroids")
        table_k: Vector = np.frombuffer(data, dtype="<f4")
        if data == self.clusters * NAN_BYTES and num_values == 0:
            return table_k
        if not np.isfinite(table_k).all() or (np.signbit(table_k) & (table_k == 0)).any():
            raise FrameError("a centroid is not finite, or minus zero")
        if (table_k[1:-1] < table_k[:-2]).any():
            raise FrameError("centroids are not ascending")
        return table_k

    def decode(self, codes: Codes, table: Vector, start: int) -> Decoded:
        """See `Quantiser.decode`."""
        return Decoded(codes, table[:-1])

    def rest(self, table: Vector) -> float:
        """See `Quantiser.rest`: the mean of the cluster that is not sent."""
        return float(table[-1])


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
