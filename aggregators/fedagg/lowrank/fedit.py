"""FedIT: the mean of the factors, each by itself.

Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedagg.lowrank.factors import Factors, counted, rounded, weighted_sum


def mean_of_factors(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return B = Σ pₖ Bₖ, A = Σ pₖ Aₖ. The product misses s Σ pₖ (Bₖ − B)(Aₖ − A): 0 if all have the same B, or A.

    Raises:
        InvalidInput: see `counted`; ranks and scales must be the same.
    """
    clients, p_k = counted(clients, weights, alike=True)
    b_mr = weighted_sum([client.b_mr for client in clients], p_k)
    a_rn = weighted_sum([client.a_rn for client in clients], p_k)
    return Factors(rounded(b_mr), rounded(a_rn), clients[0].scale)
