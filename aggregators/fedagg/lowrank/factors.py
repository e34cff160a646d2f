"""One adapted matrix in factors, and what every method does with them.

Shape legend: m × n the adapted matrix (outputs × inputs, as in PEFT), r a rank, K clients, R = Σ rₖ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import InvalidInput

Matrix = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
"""Inside of a computation: sums and decompositions are made in float64 and rounded once, at the end."""


@dataclass(frozen=True, eq=False)
class Factors:
    """P = scale · B A, never multiplied out. Rank 0 is the matrix of zeros; a stack may have r > min(m, n).

    Attributes:
        b_mr: B, float32.
        a_rn: A, float32.
        scale: α / r of an adapter, or 1.
    """

    b_mr: Matrix
    a_rn: Matrix
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the shapes and every value.

        Raises:
            InvalidInput: not two float32 matrices that can be multiplied, m or n is 0, a value is not finite, or the
                scale is not positive and finite.
        """
        check_matrix("B", self.b_mr)
        check_matrix("A", self.a_rn)
        if self.b_mr.shape[1] != self.a_rn.shape[0]:
            raise InvalidInput(f"B {shape_of(self.b_mr)} and A {shape_of(self.a_rn)}: B's columns are to be A's rows")
        if 0 in self.shape:
            raise InvalidInput(f"adapted matrix of {self.shape[0]} × {self.shape[1]}: at least 1 × 1")
        if not 0 < self.scale < math.inf:
            raise InvalidInput(f"scale {self.scale}: positive and finite")

    @property
    def rank(self) -> int:
        """Number of columns of B; the rank of the product is at most that."""
        return len(self.a_rn)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.b_mr.shape[0], self.a_rn.shape[1]


def shape_of(matrix: npt.NDArray[Any]) -> str:
    """Return a shape as errors write it: `768 × 16`."""
    return " × ".join(map(str, matrix.shape)) or "scalar"


def check_matrix(what: str, matrix: npt.NDArray[Any]) -> None:
    """Check that this is a matrix of finite float32 values.

    Raises:
        InvalidInput: it is not; `what` names it.
    """
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        raise InvalidInput(f"{what} of {matrix.dtype} and shape {shape_of(matrix)}: a float32 matrix")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InvalidInput(f"{what} has {matrix[row, column]} in row {row}, column {column}: every value is finite")


def check_rank(what: str, rank: int, shape: tuple[int, int]) -> None:
    """Check that an adapter of m × n may have this rank.

    Raises:
        InvalidInput: it is below 1 or above min(m, n).
    """
    if not 1 <= rank <= min(shape):
        raise InvalidInput(f"{what} {rank}: from 1 to {min(shape)}, the smaller side of {shape[0]} × {shape[1]}")


def shares(weights: Sequence[float], num_clients: int) -> list[float]:
    """Return p: the weights divided by their sum.

    Raises:
        InvalidInput: no clients, not one weight for each, a weight that is negative or not finite, or all are 0.
    """
    if num_clients == 0 or len(weights) != num_clients:
        raise InvalidInput(f"{len(weights)} weights for {num_clients} clients: one for each, and at least one client")
    for index, weight in enumerate(weights):
        if not 0 <= weight < math.inf:
            raise InvalidInput(f"weight {weight} of client {index}: finite and not negative")
    largest = max(weights)
    if largest == 0:
        raise InvalidInput(f"the weights of {num_clients} clients are all 0: at least one above 0")
    # By the largest first: a sum of huge weights would overflow, and tiny ones would lose digits.
    parts = [weight / largest for weight in weights]
    return [part / math.fsum(parts) for part in parts]


def counted(
    clients: Sequence[Factors], weights: Sequence[float], *, alike: bool = False
) -> tuple[list[Factors], list[float]]:
    """Return the clients of a weight above 0, and p: their weights divided by the sum.

    The others are checked too but then nowhere in the arithmetic: a rule that gives an outlier no weight must be
    rid of its rounding errors as well.

    Args:
        clients: K adapters of one matrix.
        weights: one for each, in the same order.
        alike: the method averages factors, so ranks and scales must be the same.

    Raises:
        InvalidInput: see `shares`; or the shapes differ, a rank is out of bounds, or ranks or scales differ and
            must not.
    """
    p_k = shares(weights, len(clients))
    first = clients[0]
    for index, client in enumerate(clients):
        if client.shape != first.shape:
            raise InvalidInput(
                f"client {index} adapts {client.shape[0]} × {client.shape[1]}, client 0"
                f" {first.shape[0]} × {first.shape[1]}: the same matrix for all"
            )
        check_rank(f"client {index}: rank", client.rank, client.shape)
        if alike and (client.rank, client.scale) != (first.rank, first.scale):
            raise InvalidInput(
                f"client {index} has rank {client.rank} and scale {client.scale}, client 0 {first.rank} and"
                f" {first.scale}: the same for all, where factors are averaged"
            )
    chosen = [index for index, p in enumerate(p_k) if p > 0]
    return [clients[index] for index in chosen], [p_k[index] for index in chosen]


def rounded(wide: Wide) -> Matrix:
    """Return float32; a value too large becomes infinite, which `Factors` refuses."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(wide, dtype=np.float32)


def weighted_sum(matrices: Sequence[Matrix], p_k: Sequence[float]) -> Wide:
    """Return Σ pₖ Xₖ of matrices of one shape, in float64."""
    total = np.zeros(matrices[0].shape)
    for p, matrix in zip(p_k, matrices, strict=True):
        total += np.multiply(matrix, p, dtype=np.float64)
    return total


def combine(parts: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Return Σ cₖ Pₖ as factors of rank R with scale 1: B = [c₁ s₁ B₁ … ], A = [A₁; … ].

    The coefficients stand on one factor only: on both they would be squared. Exact but for one rounding of B to
    float32. Ranks and scales may differ. Also sums the changes of a base matrix, which `recompress` then makes small.

    Raises:
        InvalidInput: nothing to sum, shapes that differ, or a coefficient that is not finite.
    """
    if not parts or len(parts) != len(coefficients):
        raise InvalidInput(f"{len(coefficients)} coefficients for {len(parts)} matrices: one for each, at least one")
    shapes = sorted({part.shape for part in parts})
    if len(shapes) > 1:
        raise InvalidInput(f"matrices of shapes {shapes}: the same for all")
    if not np.isfinite(coefficients).all():
        raise InvalidInput(f"coefficients {list(coefficients)}: finite")
    (m, n), total = shapes[0], sum(part.rank for part in parts)
    b_mR, a_Rn = np.empty((m, total), dtype=np.float32), np.empty((total, n), dtype=np.float32)
    start = 0
    for part, coefficient in zip(parts, coefficients, strict=True):
        stop = start + part.rank
        b_mR[:, start:stop] = rounded(np.multiply(part.b_mr, coefficient * part.scale, dtype=np.float64))
        a_Rn[start:stop] = part.a_rn
        start = stop
    return Factors(b_mR, a_Rn)


def product_norm(part: Factors) -> float:
    """Return the Frobenius norm of scale · B A from the r × r Gram matrices: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ).

    Columns that nearly cancel cost digits: the error is about 10⁻⁸ of ‖B‖ ‖A‖, not of the norm.
    """
    b_mr, a_rn = part.b_mr.astype(np.float64), part.a_rn.astype(np.float64)
    return part.scale * math.sqrt(max(0.0, float(np.sum((b_mr.T @ b_mr) * (a_rn @ a_rn.T)))))


def zero_pad(part: Factors, rank: int) -> Factors:
    """Return the same product in factors of a larger rank: columns of B and rows of A that are 0.

    Raises:
        InvalidInput: `rank` is below the present one, or above min(m, n).
    """
    check_rank("padded rank", rank, part.shape)
    more = rank - part.rank
    if more < 0:
        raise InvalidInput(f"padded rank {rank}: at least {part.rank}, the rank there is")
    return Factors(np.pad(part.b_mr, ((0, 0), (0, more))), np.pad(part.a_rn, ((0, more), (0, 0))), part.scale)
