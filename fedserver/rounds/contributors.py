"""A mean over those clients who have trained a value, where others of a lower rank have not.

Shape legend: n values in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from fedcore.layout import Layout, TensorSpec, Vector
from fedcore.sending import Sending, rank_axes


def over_contributors(
    blocks: Iterable[Vector], layout: Layout, sending: Sending, weights: Mapping[str, int]
) -> Iterator[Vector]:
    """Yield blocks of the mean over all clients as the mean over those whose rank reaches a value.

    A value that nobody has trained stays 0.

    Args:
        blocks: consecutive blocks of the mean, D values in all; changed in place.
        layout: of what moves, D values.
        sending: says each client's rank.
        weights: by client, above 0.
    """
    ranks = np.array([sending.rank_of(client) for client in weights])
    weight_k = np.array(list(weights.values()), dtype=np.float64)
    # reached[j]: the weight of those who train what the j-th rank adds.
    reached = np.array([weight_k[ranks > index].sum() for index in range(sending.rank)])
    factor = np.divide(weight_k.sum(), reached, out=np.ones_like(reached), where=reached > 0)
    tensors = [(tensor, rank_axes(tensor)) for tensor in layout.tensors if rank_axes(tensor)]
    start = 0
    for block in blocks:
        for tensor, axes in tensors:
            first, end = max(start, tensor.offset), min(start + block.size, tensor.offset + tensor.num_values)
            if first < end:
                index = _rank_index(tensor, axes, np.arange(first - tensor.offset, end - tensor.offset))
                block[first - start : end - start] = block[first - start : end - start] * factor[index]
        start += block.size
        yield block


def _rank_index(tensor: TensorSpec, axes: tuple[int, ...], place_n: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each place of a tensor, in row-major order, which rank it belongs to, from 0."""
    along = np.unravel_index(place_n, tensor.shape)
    index_n: npt.NDArray[np.int64] = np.max([along[axis] for axis in axes], axis=0)
    return index_n
