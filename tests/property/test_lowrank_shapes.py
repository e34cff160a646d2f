"""The low-rank algebra at every shape, rank and weight against dense matrices.

Shape legend: m × n the adapted matrix, r a rank, K clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedagg.lowrank import (
    Factors,
    factored_svd,
    mean_of_factors,
    padded_mean,
    product_norm,
    randomised_svd,
    recompress,
    redistribute,
    refined_mean,
    residual,
    stack,
    start,
    truncated_svd,
    zero_pad,
)
from tests.support.factors import Dense, dense, dense_mean, draw

CLOSE = 1e-6


@dataclass(frozen=True)
class Crowd:
    clients: list[Factors]
    weights: list[float]
    seed: int


@st.composite
def crowds(draw_from: st.DrawFn, *, alike: bool) -> Crowd:
    m, n = draw_from(st.integers(1, 12)), draw_from(st.integers(1, 12))
    num_clients, seed = draw_from(st.integers(1, 5)), draw_from(st.integers(0, 2**32))
    ranks = st.integers(1, min(m, n))
    scales = st.sampled_from([0.25, 1.0, 3.0])
    one = draw_from(st.tuples(ranks, scales))
    kinds = [one if alike else draw_from(st.tuples(ranks, scales)) for _ in range(num_clients)]
    rng = np.random.default_rng(seed)
    clients = [draw(rng, m, n, rank, scale) for rank, scale in kinds]
    weights = draw_from(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=num_clients, max_size=num_clients))
    weights[draw_from(st.integers(0, num_clients - 1))] = 1.0
    return Crowd(clients, weights, seed)


def near(found: Dense, wanted: Dense, crowd: Crowd) -> bool:
    """Return whether the two are alike, measured by the products that went in: their mean may nearly cancel."""
    size = max(
        client.scale * float(np.linalg.norm(client.b_mr) * np.linalg.norm(client.a_rn)) for client in crowd.clients
    )
    return float(np.linalg.norm(found - wanted)) <= CLOSE * size


@given(crowds(alike=False))
def test_a_stack_is_the_mean_of_the_products_and_recompression_keeps_it(crowd: Crowd) -> None:
    wanted = dense_mean(crowd.clients, crowd.weights)
    stacked = stack(crowd.clients, crowd.weights)
    assert stacked.rank == sum(c.rank for c, weight in zip(crowd.clients, crowd.weights, strict=True) if weight > 0)
    assert near(dense(stacked), wanted, crowd)
    small = recompress(stacked)
    assert small.rank <= min(stacked.rank, *stacked.shape)
    assert near(dense(small), wanted, crowd)
    assert np.isclose(product_norm(stacked), np.linalg.norm(wanted), rtol=1e-5, atol=1e-5)


@given(crowds(alike=True))
def test_fedex_is_exact_and_of_bounded_rank(crowd: Crowd) -> None:
    first = crowd.clients[0]
    found = residual(crowd.clients, crowd.weights)
    assert found.rank <= min((len(crowd.clients) - 1) * first.rank, *first.shape)
    applied = dense(mean_of_factors(crowd.clients, crowd.weights)) + dense(found)
    assert near(applied, dense_mean(crowd.clients, crowd.weights), crowd)


@given(crowds(alike=False), st.data())
def test_flexlora_is_the_best_of_its_rank(crowd: Crowd, data: st.DataObject) -> None:
    shape = crowd.clients[0].shape
    rank, balanced = data.draw(st.integers(1, min(shape))), data.draw(st.booleans())
    wanted = dense_mean(crowd.clients, crowd.weights)
    (got,) = redistribute(crowd.clients, crowd.weights, [(rank, 2.0)], balanced=balanced)
    u, s, vt = np.linalg.svd(wanted, full_matrices=False)
    error = np.linalg.norm(dense(got) - wanted)
    assert abs(error - np.linalg.norm(s[rank:])) <= CLOSE * max(1.0, float(s[0])) * 10
    if rank == min(shape):
        assert near(dense(got), (u * s) @ vt, crowd)
    assert got.rank == rank == np.linalg.matrix_rank(got.a_rn)


@given(crowds(alike=True), st.sampled_from([0.0, 0.01, 1.0]))
def test_lora_fair_is_never_worse_than_the_mean_of_factors(crowd: Crowd, penalty: float) -> None:
    wanted = dense_mean(crowd.clients, crowd.weights)
    plain = np.linalg.norm(dense(mean_of_factors(crowd.clients, crowd.weights)) - wanted)
    found = np.linalg.norm(dense(refined_mean(crowd.clients, crowd.weights, penalty)) - wanted)
    assert found <= plain * (1 + 1e-5) + 1e-4


@given(crowds(alike=False), st.data())
def test_padding_adds_zeros_behind_what_was_there(crowd: Crowd, data: st.DataObject) -> None:
    part = crowd.clients[0]
    rank = data.draw(st.integers(part.rank, min(part.shape)))
    padded = zero_pad(part, rank)
    assert (padded.rank, padded.scale) == (rank, part.scale)
    assert np.array_equal(padded.b_mr[:, : part.rank], part.b_mr)
    assert np.array_equal(padded.a_rn[: part.rank], part.a_rn)
    assert not padded.b_mr[:, part.rank :].any()
    assert not padded.a_rn[part.rank :].any()
    even = [Factors(client.b_mr, client.a_rn) for client in crowd.clients]
    mean = padded_mean(even, crowd.weights)
    assert mean.rank == max(c.rank for c in even)


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 2**32), st.data())
def test_decompositions_and_starts_of_every_shape(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    matrix = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for svd in (truncated_svd(matrix, rank), randomised_svd(matrix, rank)):
        assert (svd.u_mq.shape, svd.s_q.shape, svd.v_nq.shape) == ((m, rank), (rank,), (n, rank))
        assert np.allclose(svd.s_q, values[:rank], atol=1e-5)
        assert np.allclose(svd.u_mq.T @ svd.u_mq, np.eye(rank), atol=1e-6)
        assert np.allclose(svd.v_nq.T @ svd.v_nq, np.eye(rank), atol=1e-6)
    begun = start(matrix, rank, 0.5)
    error = np.linalg.norm(begun.b_mr.astype(np.float64) @ begun.r_rr @ begun.a_rn + 0.5 * np.sign(matrix))
    tail = 0.5 * np.linalg.norm(np.linalg.svd(np.sign(matrix.astype(np.float64)), compute_uv=False)[rank:])
    assert abs(error - tail) <= 1e-5


@given(crowds(alike=False))
def test_factored_and_dense_decompositions_agree(crowd: Crowd) -> None:
    part = stack(crowd.clients, crowd.weights)
    svd, values = factored_svd(part), np.linalg.svd(dense(part), compute_uv=False)
    width = min(len(svd.s_q), len(values))
    assert np.allclose(svd.s_q[:width], values[:width], atol=1e-9 * (1 + float(values[0])))
    assert np.allclose((svd.u_mq * svd.s_q) @ svd.v_nq.T, dense(part), atol=1e-9 * (1 + float(values[0])))
