"""Each method's algebra against dense matrices, at sizes where its error is known.

Shape legend: m × n the adapted matrix, r a rank, K clients.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fedagg.lowrank import (
    Factors,
    combine,
    factored_svd,
    mean_of_factors,
    norm_weights,
    padded_mean,
    product_norm,
    recompress,
    redistribute,
    refined_mean,
    residual,
    stack,
    zero_pad,
)
from fedagg.lowrank.fedex import cross_covariance
from tests.support.factors import Dense, crowd, dense, dense_mean, distance, draw, regauged

Method = Callable[[Sequence[Factors], Sequence[float]], Dense]

WEIGHTS = [1.0, 2.0, 3.0, 4.0, 10.0]
EXACT: dict[str, Method] = {
    "flora": lambda clients, weights: dense(stack(clients, weights)),
    "fedex": lambda clients, weights: dense(mean_of_factors(clients, weights)) + dense(residual(clients, weights)),
    "flexlora": lambda clients, weights: dense(redistribute(clients, weights, [(20, 0.5)])[0]),
    "flexlora-balanced": lambda clients, weights: dense(
        redistribute(clients, weights, [(20, 0.5)], balanced=True)[0],
    ),
}
BIASED: dict[str, Method] = {
    "fedit": lambda clients, weights: dense(mean_of_factors(clients, weights)),
    "hetlora": lambda clients, weights: dense(padded_mean(clients, norm_weights(clients))),
    "lora-fair": lambda clients, weights: dense(refined_mean(clients, weights)),
}
METHODS = EXACT | BIASED
# Neither square alone nor wide alone: a transposed residual fits a square layer and is wrong.
SHAPES = [(48, 31), (31, 48), (40, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_method_applies_the_mean_of_the_products(name: str, shape: tuple[int, int]) -> None:
    clients = crowd(1, *shape, [4] * 5, scale=2.0)
    assert distance(EXACT[name](clients, WEIGHTS), dense_mean(clients, WEIGHTS)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BIASED)
def test_a_biased_method_misses_it(name: str, shape: tuple[int, int]) -> None:
    clients = crowd(1, *shape, [4] * 5, scale=2.0)
    assert distance(BIASED[name](clients, WEIGHTS), dense_mean(clients, WEIGHTS)) > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_one_client_alone_gets_its_own_update(name: str) -> None:
    clients = crowd(2, 33, 27, [4], scale=0.5)
    assert distance(METHODS[name](clients, [7.0]), dense(clients[0])) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_clients_is_no_matter(name: str) -> None:
    clients = crowd(3, 33, 27, [4] * 5)
    order = [3, 0, 4, 2, 1]
    permuted = METHODS[name]([clients[i] for i in order], [WEIGHTS[i] for i in order])
    assert distance(permuted, METHODS[name](clients, WEIGHTS)) < 1e-6


@pytest.mark.parametrize("name", [name for name in METHODS if name != "hetlora"])  # it does not use these weights
def test_a_client_of_weight_0_leaves_no_trace(name: str) -> None:
    clients = crowd(4, 33, 27, [4] * 3)
    huge = Factors(clients[0].b_mr * np.float32(1e30), clients[0].a_rn * np.float32(1e30))
    with_huge = METHODS[name]([huge, *clients], [0.0, 1.0, 2.0, 3.0])
    assert np.array_equal(with_huge, METHODS[name](clients, [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("name", METHODS)
def test_only_biased_methods_see_the_gauge_of_a_clients_factors(name: str) -> None:
    clients = crowd(5, 33, 27, [4] * 5)
    others = [regauged(clients[0], np.random.default_rng(6)), *clients[1:]]
    moved = distance(METHODS[name](others, WEIGHTS), METHODS[name](clients, WEIGHTS))
    assert moved > 0.05 if name in BIASED else moved < 2e-6


@pytest.mark.parametrize("resting", ["A", "B"])
def test_a_mean_of_factors_is_exact_where_one_factor_rests(resting: str) -> None:
    clients = crowd(7, 30, 21, [3] * 5, scale=2.0)
    first = clients[0]
    if resting == "A":
        clients = [Factors(client.b_mr, first.a_rn, 2.0) for client in clients]
    else:
        clients = [Factors(first.b_mr, client.a_rn, 2.0) for client in clients]
    assert distance(dense(mean_of_factors(clients, WEIGHTS)), dense_mean(clients, WEIGHTS)) < 1e-6
    assert residual(clients, WEIGHTS).rank == 0


def test_fedit_on_random_factors_is_off_by_the_root_of_1_minus_1_in_k() -> None:
    errors, both = [], []
    for seed in range(10):
        clients = crowd(seed, 64, 48, [4] * 5)
        wanted = dense_mean(clients, [1] * 5)
        errors.append(distance(dense(mean_of_factors(clients, [1] * 5)), wanted))
        # What stacking with the weight on both factors would give.
        both.append(distance(dense(combine(clients, [0.04] * 5)), wanted))
    assert np.mean(errors) == pytest.approx(0.89, abs=0.02)
    assert np.mean(both) == pytest.approx(0.8, abs=1e-6)


def test_stacked_ranks_and_scales_may_differ() -> None:
    clients = [draw(np.random.default_rng(rank), 20, 30, rank, 16 / rank) for rank in (1, 2, 4, 8)]
    stacked = stack(clients, [1, 1, 2, 5])
    assert (stacked.rank, stacked.scale) == (15, 1.0)
    assert distance(dense(stacked), dense_mean(clients, [1, 1, 2, 5])) < 1e-6


def test_fedex_residual_of_five_clients_of_rank_4_has_rank_16_of_20() -> None:
    clients = crowd(8, 48, 31, [4] * 5)
    mean = mean_of_factors(clients, WEIGHTS)
    missing = dense_mean(clients, WEIGHTS) - dense(mean)
    left, right = cross_covariance(clients, [weight / 20 for weight in WEIGHTS])
    assert (left.shape, right.shape) == ((48, 16), (16, 31))
    assert distance(left @ right, missing) < 1e-6
    found = residual(clients, WEIGHTS)
    assert found.rank == 16 == np.linalg.matrix_rank(missing, tol=1e-3)
    assert distance(dense(found), missing) < 1e-6


def test_fedex_residual_of_clients_that_share_b_or_all_is_nothing() -> None:
    clients = crowd(9, 30, 20, [4] * 3)
    same = [clients[0]] * 3
    assert residual(same, [0.1, 0.2, 0.7]).rank == 0
    shared_b = [Factors(clients[0].b_mr, client.a_rn) for client in clients]
    assert residual(shared_b, [0.1, 0.2, 0.7]).rank == 0


def test_fedex_residual_of_rounding_alone_is_nothing() -> None:
    b_mr = crowd(9, 30, 20, [4])[0].b_mr
    # Sevenths do not add up to 1: the mean of equal factors is off by a last bit of float64.
    shared_b = [Factors(b_mr, client.a_rn) for client in crowd(20, 30, 20, [4] * 7)]
    assert residual(shared_b, [1] * 7).rank == 0


def test_fedex_is_exact_with_an_outlier_of_hardly_any_weight() -> None:
    clients = crowd(21, 30, 20, [4] * 4)
    clients[2] = Factors(clients[2].b_mr, clients[2].a_rn * np.float32(1e8))
    weights = [1, 1, 1e-9, 1]
    assert distance(EXACT["fedex"](clients, weights), dense_mean(clients, weights)) < 1e-6


@pytest.mark.parametrize("balanced", [False, True])
def test_flexlora_error_is_the_tail_of_the_singular_values(balanced: bool) -> None:
    clients = crowd(10, 48, 31, [2, 3, 4, 5, 6])
    wanted = dense_mean(clients, WEIGHTS)
    values = np.linalg.svd(wanted, compute_uv=False)
    assert np.allclose(factored_svd(stack(clients, WEIGHTS)).s_q[:20], values[:20], rtol=1e-6)
    receivers = [(rank, 8 / rank) for rank in (1, 4, 8, 16, 19, 20, 31)]
    for (rank, scale), got in zip(receivers, redistribute(clients, WEIGHTS, receivers, balanced=balanced), strict=True):
        assert (got.rank, got.scale) == (rank, scale)
        error = np.linalg.norm(dense(got) - wanted)
        assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-5, abs=1e-6 * float(values[0]))


@pytest.mark.parametrize("balanced", [False, True])
def test_flexlora_gives_more_rank_than_there_is_without_dead_directions(balanced: bool) -> None:
    clients = crowd(11, 30, 20, [2, 1])
    (got,) = redistribute(clients, [1, 1], [(8, 1.0)], balanced=balanced)
    assert distance(dense(got), dense_mean(clients, [1, 1])) < 1e-6
    assert np.linalg.matrix_rank(got.a_rn) == 8
    assert np.linalg.norm(got.a_rn[3:], axis=1) == pytest.approx(1)
    if balanced:
        assert np.linalg.norm(got.a_rn[:3], axis=1) == pytest.approx(np.linalg.norm(got.b_mr[:, :3], axis=0))


def test_flexlora_of_updates_that_are_0_is_0_and_can_still_learn() -> None:
    b_mr, a_rn = np.zeros((6, 2), np.float32), np.ones((2, 5), np.float32)
    (got,) = redistribute([Factors(b_mr, a_rn)], [1], [(3, 2.0)], balanced=True)
    assert not got.b_mr.any()
    assert np.allclose(got.a_rn @ got.a_rn.T, np.eye(3), atol=1e-6)


def test_hetlora_pads_and_weighs_by_norm() -> None:
    clients = crowd(12, 25, 35, [2, 4, 8], scale=2.0)
    norms = [float(np.linalg.norm(dense(client))) for client in clients]
    assert norm_weights(clients) == pytest.approx(norms, rel=1e-9)
    shares = np.array(norms) / sum(norms)
    b_mr, a_rn = np.zeros((25, 8)), np.zeros((8, 35))
    for share, client in zip(shares, clients, strict=True):
        b_mr[:, : client.rank] += share * client.b_mr
        a_rn[: client.rank] += share * client.a_rn
    mean = padded_mean(clients, norms)
    assert np.allclose(mean.b_mr, b_mr, atol=1e-6)
    assert np.allclose(mean.a_rn, a_rn, atol=1e-6)
    assert mean.scale == 2.0
    for client in clients:
        assert np.array_equal(dense(zero_pad(client, 11)), dense(client))


def test_lora_fair_is_the_least_squares_solution() -> None:
    clients = crowd(15, 30, 22, [3] * 5)
    plain = mean_of_factors(clients, WEIGHTS)
    wanted, a_rn = dense_mean(clients, WEIGHTS), plain.a_rn.astype(np.float64)
    for penalty in (0.0, 0.01, 5.0):
        # The ridge as one ordinary least squares: √λ ΔB ≈ 0 beside ΔB A ≈ E.
        rows = np.hstack([a_rn, np.sqrt(penalty) * np.eye(3)])
        right = np.hstack([wanted - dense(plain), np.zeros((30, 3))])
        shift = np.linalg.lstsq(rows.T, right.T, rcond=None)[0].T
        found = refined_mean(clients, WEIGHTS, penalty)
        assert distance(found.b_mr, plain.b_mr + shift) < 1e-6
        assert np.array_equal(found.a_rn, plain.a_rn)


def test_lora_fair_of_random_factors_reaches_the_floor_and_no_further() -> None:
    errors, floors = [], []
    for seed in range(10):
        clients = crowd(seed, 64, 48, [4] * 5)
        wanted = dense_mean(clients, [1] * 5)
        found = refined_mean(clients, [1] * 5, 0.0)
        a_rn = found.a_rn.astype(np.float64)
        floor = np.linalg.norm(wanted - wanted @ np.linalg.pinv(a_rn) @ a_rn) / np.linalg.norm(wanted)
        errors.append(distance(dense(found), wanted))
        floors.append(float(floor))
    assert errors == pytest.approx(floors, rel=1e-6)
    assert np.mean(errors) == pytest.approx(0.864, abs=0.01)


def test_lora_fair_survives_a_mean_a_of_deficient_rank() -> None:
    rng = np.random.default_rng(16)
    row = rng.standard_normal((1, 20)).astype(np.float32)
    clients = [Factors(rng.standard_normal((10, 2)).astype(np.float32), np.vstack([row, row])) for _ in range(3)]
    shifted = [Factors(client.b_mr, client.a_rn * np.float32(index + 1)) for index, client in enumerate(clients)]
    found = refined_mean(shifted, [1, 1, 1], 0.0)
    assert np.abs(found.b_mr).max() < 100
    assert distance(dense(found), dense_mean(shifted, [1, 1, 1])) < 1e-6


def test_lora_fair_does_not_blow_up_what_is_rounding_of_the_mean_a() -> None:
    rng = np.random.default_rng(22)
    away, row = 10 * rng.standard_normal((8, 20)), rng.standard_normal((8, 1)) * rng.standard_normal((1, 20))
    a_rns = [(row + away).astype(np.float32), (row - away).astype(np.float32)]  # their mean is of rank 1, but rounded
    clients = [Factors(rng.standard_normal((10, 8)).astype(np.float32), a_rn) for a_rn in a_rns]
    assert np.abs(refined_mean(clients, [1, 1], 0.0).b_mr).max() < 100


def test_recompression_keeps_the_product_in_as_few_columns_as_it_needs() -> None:
    few = crowd(18, 50, 40, [3, 2])
    doubled = combine([*few, *few, few[0]], [0.5, 1, 0.5, 1, -2])
    assert doubled.rank == 13
    small = recompress(doubled)
    assert small.rank == 5
    assert distance(dense(small), dense(doubled)) < 1e-6
    loose = recompress(doubled, 0.3)
    lost = distance(dense(loose), dense(doubled))
    assert loose.rank < 5
    assert lost <= 0.3 + 1e-6
    # One fewer would have lost too much.
    assert factored_svd(doubled).tail(loose.rank - 1) > 0.3 * product_norm(doubled)
    # What cancels leaves rounding behind: it is compared with what was there.
    cancelled = combine([few[0], few[0]], [1, -1])
    nothing = recompress(cancelled, norm=product_norm(few[0]))
    assert nothing.rank == 0
    assert recompress(nothing).shape == (50, 40)


FACTORED: dict[str, Callable[[Sequence[Factors]], object]] = {
    "flora": lambda clients: stack(clients, [1, 2, 3]),
    "fedex": lambda clients: residual(clients, [1, 2, 3]),
    "fedit": lambda clients: mean_of_factors(clients, [1, 2, 3]),
    "hetlora": lambda clients: padded_mean(clients, norm_weights(clients)),
    "flexlora": lambda clients: redistribute(clients, [1, 2, 3], [(4, 1.0)]),
    "lora-fair": lambda clients: refined_mean(clients, [1, 2, 3]),
}


@pytest.mark.parametrize("name", FACTORED)
def test_no_method_builds_a_matrix_of_the_layers_size(name: str) -> None:
    clients = crowd(19, 2048, 3072, [4, 4, 4])
    tracemalloc.start()
    try:
        FACTORED[name](clients)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2048 * 3072 * 4 / 4
