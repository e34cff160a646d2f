"""HetLoRA: ranks that differ, filled up with zeros.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedagg.lowrank.factors import Factors, product_norm, zero_pad
from fedagg.lowrank.fedit import mean_of_factors


def norm_weights(clients: Sequence[Factors]) -> list[float]:
    """Return ‖Pₖ‖ of each client (Frobenius): the weights of HetLoRA's mean, before they are divided by their sum."""
    return [product_norm(client) for client in clients]


def padded_mean(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the mean of the factors, filled up with zeros to the largest rank. Not exact.

    A client of rank rₖ gets the leading rₖ columns of B and rows of A.

    Raises:
        InvalidInput: see `counted`; the scales must be the same.
    """
    largest = max((client.rank for client in clients), default=0)
    return mean_of_factors([zero_pad(client, largest) for client in clients], weights)
