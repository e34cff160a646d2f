"""Fed-SB: the mean of the small matrices between two frozen factors.

Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning, 2025. W = W0 + B R A with common B and A, so Σ pₖ B Rₖ A = B (Σ pₖ Rₖ) A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedagg.lowrank.factors import Matrix, check_matrix, rounded, shape_of, shares
from fedcore.errors import InvalidInput


def mean_of_squares(
    squares: Sequence[Matrix], weights: Sequence[float], rank: int, over: Literal["all", "contributors"] = "all"
) -> Matrix:
    """Return the weighted mean of R, r × r. Exact over all.

    A client of smaller rank rₖ trains the leading rₖ × rₖ block; the singular values of the start are in order, so its
    basis is the leading part of the others'. Given differences instead of values, an entry that nobody trained
    stays as it was in both ways.

    Args:
        squares: Rₖ of each client, rₖ × rₖ with rₖ ≤ r, or its difference to the R that it got.
        weights: one for each.
        rank: r, of the result.
        over: "all" takes an entry that a client did not train as 0, which is the mean of the products. "contributors"
            divides each entry by the weights of those who trained it, so that few of them are not diluted.

    Raises:
        InvalidInput: see `shares`; or one is not a finite float32 square of rank 1 to `rank`.
    """
    p_k = shares(weights, len(squares))
    if over not in ("all", "contributors"):
        raise InvalidInput(f"mean over {over!r}: 'all' or 'contributors'")
    sum_rr, share_rr = np.zeros((rank, rank)), np.zeros((rank, rank))
    for index, (p, square) in enumerate(zip(p_k, squares, strict=True)):
        check_matrix(f"client {index}: R", square)
        own = len(square)
        if square.shape != (own, own) or not 1 <= own <= rank:
            raise InvalidInput(f"client {index}: R of {shape_of(square)}: square, and of rank 1 to {rank}")
        sum_rr[:own, :own] += np.multiply(square, p, dtype=np.float64)
        share_rr[:own, :own] += p
    if over == "contributors":
        np.divide(sum_rr, share_rr, out=sum_rr, where=share_rr > 0)
    return rounded(sum_rr)
