"""Random adapters of one matrix, and the dense matrices that the factored algebra is held against.

Shape legend: m × n the adapted matrix, r a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedagg.lowrank import Factors, Matrix

Dense = npt.NDArray[np.float64]


def draw(rng: np.random.Generator, m: int, n: int, rank: int, scale: float = 1.0) -> Factors:
    b_mr, a_rn = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    return Factors(b_mr.astype(np.float32), a_rn.astype(np.float32), scale)


def crowd(seed: int, m: int, n: int, ranks: Sequence[int], scale: float = 1.0) -> list[Factors]:
    rng = np.random.default_rng(seed)
    return [draw(rng, m, n, rank, scale) for rank in ranks]


def dense(part: Factors) -> Dense:
    return part.scale * (part.b_mr.astype(np.float64) @ part.a_rn.astype(np.float64))


def dense_mean(clients: Sequence[Factors], weights: Sequence[float]) -> Dense:
    total = sum(weights)
    mean: Dense = np.zeros(clients[0].shape)
    for client, weight in zip(clients, weights, strict=True):
        mean += weight / total * dense(client)
    return mean


def distance(found: Dense | Matrix, wanted: Dense | Matrix) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖, both Frobenius."""
    return float(np.linalg.norm(found - wanted.astype(np.float64)) / np.linalg.norm(wanted.astype(np.float64)))


def regauged(part: Factors, rng: np.random.Generator) -> Factors:
    """Return (B G, G⁻¹ A): the same product in other factors."""
    gauge = np.linalg.qr(rng.standard_normal((part.rank, part.rank)))[0] * 3.0
    b_mr, a_rn = part.b_mr @ gauge, np.linalg.inv(gauge) @ part.a_rn
    return Factors(b_mr.astype(np.float32), a_rn.astype(np.float32), part.scale)
