"""HetLoRA: ranks that differ, filled up with zeros, and clients that prune their own.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedagg.lowrank.factors import Factors, product_norm, zero_pad
from fedagg.lowrank.fedit import mean_of_factors
from fedcore.errors import InvalidInput


def norm_weights(clients: Sequence[Factors]) -> list[float]:
    """Return ‖Pₖ‖ of each client (Frobenius): the weights of HetLoRA's mean, before they are divided by their sum."""
    return [product_norm(client) for client in clients]


def padded_mean(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return the mean of the factors, filled up with zeros to the largest rank. Not exact.

    A client of rank rₖ gets `truncate(mean, rₖ)`.

    Raises:
        InvalidInput: see `counted`; the scales must be the same.
    """
    largest = max((client.rank for client in clients), default=0)
    return mean_of_factors([zero_pad(client, largest) for client in clients], weights)


def kept_rank(rank: int, gamma: float) -> int:
    """Return max(1, ⌊γ rank⌋): what is left if the tail is pruned.

    Raises:
        InvalidInput: `gamma` is not between 0 and 1.
    """
    if not 0 < gamma < 1:
        raise InvalidInput(f"gamma {gamma}: above 0 and below 1")
    return max(1, math.floor(gamma * rank))


def tail_penalty(part: Factors, gamma: float) -> float:
    """Return ‖B_tail‖ ‖A_tail‖ (Frobenius) of the ranks beyond `kept_rank`; times λ, a term of the client's loss."""
    kept = kept_rank(part.rank, gamma)
    b_tail, a_tail = part.b_mr[:, kept:].astype(np.float64), part.a_rn[kept:].astype(np.float64)
    return float(np.linalg.norm(b_tail) * np.linalg.norm(a_tail))


def pruned_rank(before: Factors, after: Factors, gamma: float) -> int:
    """Return the client's rank for the next round: `kept_rank` if training made the tail's penalty smaller.

    Args:
        before: the factors that the round began with.
        after: those that it ended with, of the same rank.
        gamma: γ, the share of ranks that stay.

    Raises:
        InvalidInput: the ranks or the shapes differ, or `gamma` is out of bounds.
    """
    if (before.rank, before.shape) != (after.rank, after.shape):
        raise InvalidInput(
            f"rank {before.rank} of {before.shape} before training, {after.rank} of {after.shape} after: the same"
        )
    shrank = tail_penalty(after, gamma) < tail_penalty(before, gamma)
    return kept_rank(after.rank, gamma) if shrank else after.rank
