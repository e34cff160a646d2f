"""FlexLoRA: the mean's singular value decomposition, cut to each client's rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, 2024.
That the mean need not be formed: FLoRIST, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedagg.lowrank.factors import Factors, Wide, check_rank, rounded
from fedagg.lowrank.flora import stack
from fedagg.lowrank.svd import SEED, TOLERANCE, Svd, factored_svd
from fedcore.errors import InvalidInput
from fedcore.rng import stream


def redistribute(
    clients: Sequence[Factors],
    weights: Sequence[float],
    receivers: Sequence[tuple[int, float]],
    *,
    balanced: bool = False,
) -> list[Factors]:
    """Return for each receiver the best approximation of M = Σ pₖ Pₖ of its rank, in factors of its scale.

    The error is ‖M − P‖ = √(Σ σᵢ²) over the singular values beyond the rank: 0 from the rank of M on.

    Args:
        clients: who trained; ranks and scales may differ.
        weights: one for each.
        receivers: (rank, scale) of whoever gets factors, also of clients that did not train.
        balanced: B = U √S, A = √S Vᵀ instead of B = U S, A = Vᵀ.

    Raises:
        InvalidInput: see `counted`; or a receiver's rank is not from 1 to min(m, n), its scale not positive and finite.
    """
    mean = stack(clients, weights)
    for rank, scale in receivers:
        check_rank("receiver's rank", rank, mean.shape)
        if not 0 < scale < math.inf:
            raise InvalidInput(f"receiver's scale {scale}: positive and finite")
    svd = factored_svd(mean)
    return [split(svd, rank, scale, balanced=balanced) for rank, scale in receivers]


def split(svd: Svd, rank: int, scale: float, *, balanced: bool) -> Factors:
    """Return the leading `rank` triplets as factors of `scale`.

    Directions beyond the rank of the matrix have rows of A of length 1 and columns of B that are 0 or nearly: with
    both 0, neither would ever get a gradient.
    """
    top = _completed(svd.leading(rank), rank)
    rows = np.ones(rank)
    if balanced:
        alive = top.s_q > TOLERANCE * top.s_q[0]
        rows[alive] = np.sqrt(top.s_q[alive] / scale)
    return Factors(rounded(top.u_mq * (top.s_q / (scale * rows))), rounded((top.v_nq * rows).T), scale)


def _completed(svd: Svd, rank: int) -> Svd:
    """Return `rank` triplets, those that are missing with singular value 0."""
    missing = rank - len(svd.s_q)
    if missing <= 0:
        return svd
    return Svd(_extended(svd.u_mq, missing), np.pad(svd.s_q, (0, missing)), _extended(svd.v_nq, missing))


def _extended(columns: Wide, missing: int) -> Wide:
    """Return the columns and as many more as are missing, all orthonormal; the new ones always the same."""
    fresh = stream(SEED, "low-rank", "completion").standard_normal((len(columns), missing))
    # Twice, since what is left of `fresh` may be small.
    for _ in range(2):
        fresh = np.linalg.qr(fresh - columns @ (columns.T @ fresh))[0]
    return np.hstack([columns, fresh])
