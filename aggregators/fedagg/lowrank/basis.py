"""The start of Fed-SB: common frozen factors from the clients' first gradients.

LoRA-SB: Ponkshe et al., Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning, 2024. The sign stands for the first step of Adam from zero moments, so this approximates the first update
of full fine-tuning. The server decomposes, and sends what it found: other machines round otherwise.

Shape legend: m × n the adapted matrix, r the rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedagg.lowrank.factors import Matrix, Wide, check_matrix, check_rank, rounded, shape_of
from fedagg.lowrank.svd import truncated_svd
from fedcore.errors import InvalidInput

Votes = npt.NDArray[np.int32]


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


def add_gradients(gradients: Iterable[Matrix]) -> Wide:
    """Return the sum of clients' gradient sums, read one by one, in float64: the order hardly ever decides a sign.

    Raises:
        InvalidInput: there are none, one is not a finite float32 matrix, or the shapes differ.
    """
    total: Wide | None = None
    for index, gradient in enumerate(gradients):
        check_matrix(f"gradient of client {index}", gradient)
        total = np.zeros(gradient.shape) if total is None else total
        _check_alike(f"gradient of client {index}", gradient, total)
        total += gradient
    if total is None:
        raise InvalidInput("gradients of 0 clients: at least one")
    return total


def add_votes(votes: Iterable[npt.NDArray[np.int8]]) -> Votes:
    """Return the sum of clients' sign votes, each −1, 0 or 1: its sign is that of the majority, 0 if there is none.

    Raises:
        InvalidInput: there are none, one is not an int8 matrix of −1, 0 and 1, or the shapes differ.
    """
    total: Votes | None = None
    for index, vote in enumerate(votes):
        if vote.ndim != 2 or vote.dtype != np.int8 or (vote.size and (vote.max() > 1 or vote.min() < -1)):
            raise InvalidInput(
                f"vote of client {index}, {vote.dtype} of {shape_of(vote)}: an int8 matrix of −1, 0 and 1"
            )
        total = np.zeros(vote.shape, dtype=np.int32) if total is None else total
        _check_alike(f"vote of client {index}", vote, total)
        total += vote
    if total is None:
        raise InvalidInput("votes of 0 clients: at least one")
    return total


def start(total_mn: Wide | Matrix | Votes, rank: int, eta0: float) -> Start:
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


def digest(tensors: Mapping[str, Matrix]) -> str:
    """Return the SHA-256 (hex) of frozen tensors: their names, shapes and float32 bytes, in the order of the names.

    Two parties with the same digest hold the same bits.

    Raises:
        InvalidInput: there are none, or one is not a finite float32 matrix.
    """
    if not tensors:
        raise InvalidInput("digest of 0 tensors: at least one")
    names = sorted(tensors)
    for name in names:
        check_matrix(name, tensors[name])
    table = json.dumps([[name, *tensors[name].shape] for name in names], separators=(",", ":")).encode()
    found = hashlib.sha256(len(table).to_bytes(8, "little") + table)
    for name in names:
        found.update(np.ascontiguousarray(tensors[name], dtype="<f4").data)
    return found.hexdigest()


def _check_alike(what: str, matrix: npt.NDArray[Any], total: npt.NDArray[Any]) -> None:
    if matrix.shape != total.shape:
        raise InvalidInput(f"{what} is {shape_of(matrix)}, that of client 0 {shape_of(total)}: the same for all")
