"""Methods that average factors: exact only where one factor is the same for all.

FedIT: Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, 2024.
FFA-LoRA: Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024.
RoLoRA: Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedagg.lowrank.factors import Factors, counted, rounded, weighted_sum
from fedcore.errors import InvalidInput


def mean_of_factors(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """FedIT: B = Σ pₖ Bₖ, A = Σ pₖ Aₖ. Not exact: the product misses s Σ pₖ (Bₖ − B)(Aₖ − A).

    Raises:
        InvalidInput: see `counted`; ranks and scales must be the same.
    """
    clients, p_k = counted(clients, weights, alike=True)
    b_mr = weighted_sum([client.b_mr for client in clients], p_k)
    a_rn = weighted_sum([client.a_rn for client in clients], p_k)
    return Factors(rounded(b_mr), rounded(a_rn), clients[0].scale)


def mean_of_moving(clients: Sequence[Factors], weights: Sequence[float], frozen: Literal["A", "B"]) -> Factors:
    """Average the factor that was trained; the frozen one stays, bit for bit. Exact.

    FFA-LoRA freezes A in every round; RoLoRA trains B and A in turn.

    Raises:
        InvalidInput: see `mean_of_factors`; or a client holds another frozen factor.
    """
    clients, p_k = counted(clients, weights, alike=True)
    first = clients[0]
    still = [client.a_rn if frozen == "A" else client.b_mr for client in clients]
    if not all(np.array_equal(factor, still[0]) for factor in still):
        raise InvalidInput(f"clients hold different frozen {frozen}: the same bits for all, or the mean is not exact")
    mean = rounded(weighted_sum([client.b_mr if frozen == "A" else client.a_rn for client in clients], p_k))
    return Factors(mean, first.a_rn, first.scale) if frozen == "A" else Factors(first.b_mr, mean, first.scale)
