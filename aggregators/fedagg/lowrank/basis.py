"""The start of Fed-SB: common frozen factors from the clients' first gradients.

LoRA-SB: Ponkshe et al., Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning, 2024. The sign stands for the first step of Adam from zero moments, so this approximates the first update
of full fine-tuning. The server decomposes, and sends what it found: other machines round otherwise.

Shape legend: m × n the adapted matrix, r the rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedagg.lowrank.factors import Matrix, Wide, check_rank, rounded, shape_of
from fedagg.lowrank.svd import truncated_svd
from fedcore.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Start:
    """W = W0 + B R A: B and A stay, R is trained. All float32.

    Attributes:
        b_mr: orthonormal columns.
        r_rr: diagonal, not negative and in descending order.
        a_rn: orthonormal rows.
    """

    b_mr: Matrix
    r_rr: Matrix
    a_rn: Matrix


def start(total_mn: Wide | Matrix, rank: int, eta0: float) -> Start:
    """Return the best approximation of −η₀ sign(G) of this rank: B = U, R = diag(S), A = Vᵀ; sign(0) = 0.

    η₀ only scales R: B and A are those of −sign(G). Besides G, one float32 matrix of m × n is built.

    Args:
        total_mn: G, the sum of gradients over all samples, or of votes.
        rank: r.
        eta0: η₀, the learning rate of the first step.

    Raises:
        InvalidInput: G is no finite matrix or all 0, `rank` is not from 1 to min(m, n), or `eta0` is not positive and
            finite, or so small or large that R is 0 or infinite in float32.
    """
    if total_mn.ndim != 2 or not np.isfinite(total_mn).all():
        raise InvalidInput(f"gradient sum of shape {shape_of(total_mn)}: a matrix of finite values")
    check_rank("rank", rank, (total_mn.shape[0], total_mn.shape[1]))
    if not 0 < eta0 < math.inf:
        raise InvalidInput(f"eta0 {eta0}: positive and finite")
    # −sign(G) without a temporary of G's width.
    step_mn: Matrix = np.subtract(total_mn < 0, total_mn > 0, dtype=np.float32)
    if not step_mn.any():
        raise InvalidInput("gradient sum is 0 everywhere: it has no direction, so there is no basis to find")
    svd = truncated_svd(step_mn, rank)
    r_rr = rounded(np.diag(eta0 * svd.s_q))
    if not 0 < r_rr[0, 0] < math.inf:
        raise InvalidInput(f"eta0 {eta0}: R would be {r_rr[0, 0]} in float32")
    return Start(rounded(svd.u_mq), r_rr, rounded(svd.v_nq.T))
