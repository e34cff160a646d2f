"""LoRA-FAIR: the mean of the factors with B corrected towards the mean of the products.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, 2024. The paper takes
gradient steps towards a larger cosine similarity, which does not see the scale; this is the least-squares form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedagg.lowrank.factors import Factors, counted, rounded, weighted_sum
from fedagg.lowrank.fedex import cross_covariance
from fedcore.errors import InvalidInput

RCOND: Final = 1e-12
"""Below this share of the largest, an eigenvalue of A Aᵀ + λ I is taken for rounding."""


def refined_mean(clients: Sequence[Factors], weights: Sequence[float], penalty: float = 0.01) -> Factors:
    """Return (B + ΔB, A): ΔB minimises ‖Σ pₖ Bₖ Aₖ − (B + ΔB) A‖² + λ ‖ΔB‖², so ΔB = E Aᵀ (A Aᵀ + λ I)⁻¹.

    B and A are the means, E is what their product misses. Not exact: with λ = 0
    what lies outside of A's rows stays missing, ‖M (I − A⁺A)‖. If A Aᵀ is then singular, ΔB is the smallest minimiser.

    Args:
        clients: K adapters of the same rank and scale.
        weights: one for each.
        penalty: λ, at least 0.

    Raises:
        InvalidInput: see `counted`; or `penalty` is negative or not finite.
    """
    if not 0 <= penalty < math.inf:
        raise InvalidInput(f"penalty {penalty}: at least 0 and finite")
    clients, p_k = counted(clients, weights, alike=True)
    b_mr = weighted_sum([client.b_mr for client in clients], p_k)
    a_rn = weighted_sum([client.a_rn for client in clients], p_k)
    left, right = cross_covariance(clients, p_k)
    inverse_rr = np.linalg.pinv(a_rn @ a_rn.T + penalty * np.eye(len(a_rn)), rcond=RCOND, hermitian=True)
    b_mr += left @ (right @ a_rn.T @ inverse_rr)
    return Factors(rounded(b_mr), rounded(a_rn), clients[0].scale)
