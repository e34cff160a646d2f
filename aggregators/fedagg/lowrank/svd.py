"""Singular value decompositions: of factors without their product, and of one matrix by LAPACK or by sampling.

Shape legend: m × n the matrix, r the rank kept, R the inner size of the factors, q = min(m, n, R).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedagg.lowrank.factors import Factors, Matrix, Wide, check_matrix, check_rank, rounded
from fedcore.errors import InvalidInput
from fedcore.rng import stream

TOLERANCE: Final = 1e-7
"""Share of a product's Frobenius norm that recompression may lose: as much as one rounding to float32 does."""

EXACT_SIDE: Final = 1024
"""Up to this smaller side a matrix is decomposed by LAPACK: about a second."""

OVERSAMPLING: Final = 16
POWER_ITERATIONS: Final = 10
SEED: Final = 42


@dataclass(frozen=True, eq=False)
class Svd:
    """U diag(S) Vᵀ; in float64.

    In every column of U the value of largest magnitude, the first of equals, is positive. So the decomposition is
    unique where the singular values are distinct; a machine's rounding may still decide between near equals, so
    what several machines need alike is computed by one and sent.

    Attributes:
        u_mq: orthonormal columns.
        s_q: not negative, in descending order.
        v_nq: orthonormal columns.
    """

    u_mq: Wide
    s_q: Wide
    v_nq: Wide

    @classmethod
    def of(cls, u_mq: Wide, s_q: Wide, vt_qn: Wide) -> Svd:
        """Return the decomposition with its signs made unique."""
        heads = u_mq[np.abs(u_mq).argmax(axis=0), np.arange(len(s_q))]
        signs = np.where(heads < 0, -1.0, 1.0)
        return cls(u_mq * signs, s_q, vt_qn.T * signs)

    def leading(self, rank: int) -> Svd:
        """Return the first `rank` triplets, or all if there are fewer: the best approximation (Eckart, Young, 1936)."""
        return Svd(self.u_mq[:, :rank], self.s_q[:rank], self.v_nq[:, :rank])

    def tail(self, rank: int) -> float:
        """Return the Frobenius norm of what `leading(rank)` leaves out."""
        return float(np.linalg.norm(self.s_q[rank:]))

    def factors(self) -> Factors:
        """Return B = U diag(S), A = Vᵀ, of scale 1, in float32."""
        return Factors(rounded(self.u_mq * self.s_q), rounded(self.v_nq.T))


def factored_svd(part: Factors) -> Svd:
    """Return the decomposition of scale · B A in O((m + n) R² + R³) time and O((m + n) R) memory.

    B = Q₁ T₁ and Aᵀ = Q₂ T₂; the core T₁ T₂ᵀ is decomposed. Nothing of m × n is built unless R is as large.
    Triplets that are 0 are kept: their vectors are orthonormal too.
    """
    if part.rank == 0:
        return Svd(np.empty((part.shape[0], 0)), np.empty(0), np.empty((part.shape[1], 0)))
    q1, t1 = np.linalg.qr(part.b_mr.astype(np.float64))
    q2, t2 = np.linalg.qr(part.a_rn.T.astype(np.float64))
    u, s, vt = np.linalg.svd(part.scale * (t1 @ t2.T), full_matrices=False)
    return Svd.of(q1 @ u, s, vt @ q2.T)


def recompress(part: Factors, tolerance: float = TOLERANCE, norm: float | None = None) -> Factors:
    """Return the same product in as few columns as `tolerance` allows, with scale 1; rank 0 if it is 0.

    Args:
        part: factors of any rank.
        tolerance: what may be lost, besides one rounding to float32, as a share of `norm`.
        norm: the Frobenius norm to compare with; the product's own unless given.

    Raises:
        InvalidInput: `tolerance` is not in [0, 1), or `norm` is negative or not finite.
    """
    if not 0 <= tolerance < 1:
        raise InvalidInput(f"tolerance {tolerance}: from 0 to below 1")
    if norm is not None and not 0 <= norm < math.inf:
        raise InvalidInput(f"norm {norm}: at least 0 and finite")
    svd = factored_svd(part)
    # tails[i] is the norm of what is lost if i triplets are kept.
    tails = np.sqrt(np.cumsum(np.square(svd.s_q[::-1])))[::-1]
    own = svd.tail(0)
    kept = int(np.count_nonzero(tails > tolerance * (own if norm is None else norm)))
    return svd.leading(kept).factors()


def truncated_svd(matrix_mn: Matrix, rank: int) -> Svd:
    """Return the `rank` leading triplets: by LAPACK if the smaller side is at most `EXACT_SIDE`, else by sampling.

    Raises:
        InvalidInput: not a finite float32 matrix, or `rank` is not from 1 to min(m, n).
    """
    check_matrix("matrix", matrix_mn)
    check_rank("rank", rank, (matrix_mn.shape[0], matrix_mn.shape[1]))
    if min(matrix_mn.shape) <= max(EXACT_SIDE, rank + OVERSAMPLING):
        u, s, vt = np.linalg.svd(matrix_mn.astype(np.float64), full_matrices=False)
        return Svd.of(u, s, vt).leading(rank)
    return randomised_svd(matrix_mn, rank)


def randomised_svd(
    matrix_mn: Matrix,
    rank: int,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
    seed: int = SEED,
) -> Svd:
    """Return nearly the `rank` leading triplets, by subspace iteration from a seeded Gaussian start.

    Halko, Martinsson, Tropp: Finding Structure with Randomness, 2011, algorithms 4.4 and 5.1. Products with the
    matrix are made in float32, everything else in float64; besides the matrix, O((m + n) (r + oversampling)) memory.
    The same input gives the same output on the same machine and libraries.

    Raises:
        InvalidInput: as `truncated_svd`; or `oversampling` or `power_iterations` is negative.
    """
    check_matrix("matrix", matrix_mn)
    m, n = matrix_mn.shape
    check_rank("rank", rank, (m, n))
    if min(oversampling, power_iterations) < 0:
        raise InvalidInput(f"oversampling {oversampling}, power iterations {power_iterations}: at least 0")
    scaled_mn, exponent = _tame(matrix_mn)
    width = min(m, n, rank + oversampling)
    sample_nw = stream(seed, "low-rank", "svd").standard_normal((n, width))
    left_mw = _basis(scaled_mn, sample_nw)
    for _ in range(power_iterations):
        left_mw = _basis(scaled_mn, _basis(scaled_mn.T, left_mw))
    small_wn = (scaled_mn.T @ left_mw.astype(np.float32)).T
    u, s, vt = np.linalg.svd(small_wn.astype(np.float64), full_matrices=False)
    return Svd.of(left_mw @ u, np.ldexp(s, exponent), vt).leading(rank)


def _basis(matrix: Matrix, columns: Wide) -> Wide:
    """Return an orthonormal basis of what the matrix makes of these columns."""
    return np.linalg.qr((matrix @ columns.astype(np.float32)).astype(np.float64))[0]


def _tame(matrix_mn: Matrix) -> tuple[Matrix, int]:
    """Return x and e with matrix = x · 2^e, such that products of x in float32 neither overflow nor vanish."""
    peak = max(float(matrix_mn.max()), -float(matrix_mn.min()))
    exponent = math.frexp(peak)[1]
    # Most need no copy.
    return (matrix_mn, 0) if abs(exponent) <= 40 else (np.ldexp(matrix_mn, -exponent), exponent)
