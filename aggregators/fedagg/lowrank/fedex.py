"""FedEx-LoRA: what averaging factors misses, in factors.

Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models,
2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedagg.lowrank.factors import Factors, Wide, combine, counted, product_norm, rounded, weighted_sum
from fedagg.lowrank.svd import TOLERANCE, recompress


def cross_covariance(clients: Sequence[Factors], p_k: Sequence[float]) -> tuple[Wide, Wide]:
    """Return L (m × (K−1) r) and N ((K−1) r × n) with L N = Σ pₖ Bₖ Aₖ − B A, where B and A are the means.

    That is Σ pₖ (Bₖ − B)(Aₖ − A), and since the first factors sum to 0, any matrix may stand for the second A.
    With a client's own, here of the heaviest, that client's block is 0: K − 1 are left.
    """
    b_mr = weighted_sum([client.b_mr for client in clients], p_k)
    pairs = list(zip(p_k, clients, strict=True))
    heaviest = pairs.pop(int(np.argmax(p_k)))[1]
    (m, n), pivot_rn = heaviest.shape, heaviest.a_rn.astype(np.float64)
    left = [np.empty((m, 0)), *(p * (client.b_mr - b_mr) for p, client in pairs)]
    right = [np.empty((0, n)), *(client.a_rn - pivot_rn for _, client in pairs)]
    return np.hstack(left), np.vstack(right)


def residual(clients: Sequence[Factors], weights: Sequence[float], tolerance: float = TOLERANCE) -> Factors:
    """Return s (Σ pₖ Bₖ Aₖ − B A), which is added to W0 beside the mean of `mean_of_factors`. Together exact.

    Its rank is at most (K − 1) r and min(m, n), and 0 where the mean is exact already. What is below `tolerance`
    of the norm of Σ pₖ Pₖ is left out.

    Raises:
        InvalidInput: see `counted`; ranks and scales must be the same. Or see `recompress`.
    """
    clients, p_k = counted(clients, weights, alike=True)
    left, right = cross_covariance(clients, p_k)
    whole = Factors(rounded(left), rounded(right), clients[0].scale)
    return recompress(whole, tolerance, product_norm(combine(clients, p_k)))
