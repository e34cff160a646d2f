"""The start of Fed-SB: truncated decompositions, their signs, the scale, the votes.

Shape legend: m × n the adapted matrix, r the rank.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedagg.lowrank import Matrix, Start, randomised_svd, start, truncated_svd
from fedagg.lowrank.svd import EXACT_SIDE, OVERSAMPLING
from tests.support.factors import Dense, distance


def gradient(seed: int, m: int, n: int) -> Matrix:
    return np.random.default_rng(seed).standard_normal((m, n), dtype=np.float32)


def applied(begun: Start) -> Dense:
    product: Dense = begun.b_mr.astype(np.float64) @ begun.r_rr @ begun.a_rn
    return product


def skew(begun: Start) -> float:
    """Return how far B's columns and A's rows are from orthonormal."""
    b_mr, a_rn = begun.b_mr.astype(np.float64), begun.a_rn.astype(np.float64)
    unit = np.eye(len(a_rn))
    return float(max(np.abs(b_mr.T @ b_mr - unit).max(), np.abs(a_rn @ a_rn.T - unit).max()))


@pytest.mark.parametrize(("m", "n"), [(60, 45), (45, 60), (50, 50)])
@pytest.mark.parametrize("rank", [1, 8, 45])
def test_the_start_is_the_best_approximation_of_the_first_update(m: int, n: int, rank: int) -> None:
    total = gradient(1, m, n).astype(np.float64)
    total[:3] = 0  # sign(0) = 0
    begun = start(total, rank, 0.01)
    wanted = -0.01 * np.sign(total)
    values = np.linalg.svd(wanted, compute_uv=False)
    error = np.linalg.norm(applied(begun) - wanted)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-5, abs=1e-6 * float(values[0]))
    assert np.diag(begun.r_rr) == pytest.approx(values[:rank], rel=1e-5, abs=1e-6 * float(values[0]))
    assert np.count_nonzero(begun.r_rr - np.diag(np.diag(begun.r_rr))) == 0
    assert (begun.b_mr.shape, begun.r_rr.shape, begun.a_rn.shape) == ((m, rank), (rank, rank), (rank, n))
    assert {begun.b_mr.dtype, begun.r_rr.dtype, begun.a_rn.dtype} == {np.dtype(np.float32)}
    assert skew(begun) <= 1e-6


def test_frozen_factors_turn_the_gradient_of_r_into_the_best_step() -> None:
    begun = start(gradient(2, 40, 30), 5, 1.0)
    full = gradient(3, 40, 30).astype(np.float64)
    b_mr, a_rn = begun.b_mr.astype(np.float64), begun.a_rn.astype(np.float64)
    # The loss of W = W0 + B R A along each entry of R, against the minimiser X of ‖B X A − full‖.
    of_r = np.array([[np.sum(full * np.outer(b_mr[:, i], a_rn[j])) for j in range(5)] for i in range(5)])
    best = np.linalg.lstsq(np.kron(b_mr, a_rn.T), full.ravel(), rcond=None)[0].reshape(5, 5)
    assert of_r == pytest.approx(best, rel=1e-5, abs=1e-5)


def test_eta0_scales_r_and_nothing_else() -> None:
    total = gradient(4, 40, 30)
    one, four = start(total, 6, 0.25), start(total, 6, 1.0)
    assert four.r_rr.tobytes() == (one.r_rr * np.float32(4)).tobytes()
    assert four.b_mr.tobytes() == one.b_mr.tobytes()
    assert four.a_rn.tobytes() == one.a_rn.tobytes()


def test_a_smaller_rank_is_the_leading_part_of_a_larger() -> None:
    total = gradient(5, 40, 30)
    small, large = start(total, 4, 1.0), start(total, 12, 1.0)
    assert np.array_equal(small.b_mr, large.b_mr[:, :4])
    assert np.array_equal(small.a_rn, large.a_rn[:4])
    assert np.array_equal(small.r_rr, large.r_rr[:4, :4])


def test_the_sum_of_votes_starts_from_the_majority() -> None:
    votes = [np.sign(gradient(seed, 7, 5)) for seed in range(3)]
    votes[0][0, 0], votes[1][0, 0], votes[2][0, 0] = 1, -1, 0
    total: Dense = np.sum(votes, axis=0, dtype=np.float64)
    assert np.abs(total).max() == 3  # how many agree is no matter, only what they say
    by_hand = [[np.sign(sum(int(vote[i, j]) for vote in votes)) for j in range(5)] for i in range(7)]
    assert by_hand[0][0] == 0
    assert distance(applied(start(total, 5, 1.0)), -np.array(by_hand, dtype=np.float64)) < 1e-6


def test_signs_of_the_vectors_do_not_depend_on_how_they_were_found() -> None:
    rng = np.random.default_rng(6)
    left, right = np.linalg.qr(rng.standard_normal((80, 10)))[0], np.linalg.qr(rng.standard_normal((60, 10)))[0]
    matrix = ((left * 2.0 ** -np.arange(10)) @ right.T).astype(np.float32)
    exact, sampled = truncated_svd(matrix, 5), randomised_svd(matrix, 5)
    flipped = truncated_svd(np.ascontiguousarray(matrix.T), 5)
    assert np.abs(exact.u_mq).max(axis=0) == pytest.approx(exact.u_mq.max(axis=0))
    assert np.allclose(sampled.u_mq, exact.u_mq, atol=1e-4)
    assert np.allclose(sampled.v_nq, exact.v_nq, atol=1e-4)
    assert np.allclose(np.abs(flipped.v_nq), np.abs(exact.u_mq), atol=1e-4)
    assert distance((flipped.u_mq * flipped.s_q) @ flipped.v_nq.T, (exact.v_nq * exact.s_q) @ exact.u_mq.T) < 1e-6


def captured(matrix: Matrix, rank: int, oversampling: int = OVERSAMPLING) -> float:
    """Return the energy in the sampled columns as a share of the most that `rank` columns can hold."""
    best = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:rank]
    found = randomised_svd(matrix, rank, oversampling)
    for vectors in (found.u_mq, found.v_nq):
        assert np.abs(vectors.T @ vectors - np.eye(rank)).max() < 1e-6
    return float(np.linalg.norm(found.u_mq.T @ matrix) ** 2 / np.sum(best**2))


@pytest.mark.parametrize("rank", [8, 64])
def test_sampling_captures_nearly_the_energy_that_can_be(rank: int) -> None:
    signs = np.sign(gradient(7, 200, 280))  # a flat spectrum: the hardest case
    assert 0.99 <= captured(signs, rank) <= 1 + 1e-6
    # What the columns beyond the rank are for.
    assert 0.95 <= captured(signs, rank, 0) < captured(signs, rank)


def test_sampling_captures_all_of_it_where_the_spectrum_has_a_gap() -> None:
    low = gradient(8, 200, 3) @ gradient(9, 3, 280)
    assert captured(low + np.float32(0.01) * gradient(10, 200, 280), 3) == pytest.approx(1, abs=1e-6)


def test_sampling_repeats_itself_and_follows_its_seed() -> None:
    matrix = gradient(9, 90, 70)
    again = [randomised_svd(matrix, 6, seed=seed) for seed in (1, 1, 2)]
    assert again[0].u_mq.tobytes() == again[1].u_mq.tobytes()
    assert again[0].u_mq.tobytes() != again[2].u_mq.tobytes()


@pytest.mark.parametrize("size", [1e-41, 1.0, 6e37])
def test_sampling_takes_matrices_of_any_magnitude(size: float) -> None:
    matrix = gradient(10, 60, 50) * np.float32(size)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert randomised_svd(matrix, 50).s_q == pytest.approx(values, rel=1e-4)


def test_a_large_start_is_sampled_orthonormal_and_within_one_more_matrix() -> None:
    m, n = EXACT_SIDE + 76, EXACT_SIDE + 176
    total = gradient(0, m, n)
    tracemalloc.start()
    try:
        begun = start(total, 8, 0.5)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert skew(begun) <= 1e-6
    # One float32 matrix; two of one byte while it is made.
    assert peak_bytes < 1.6 * m * n * 4
    signs = -0.5 * np.sign(total)
    left = 1 - distance(applied(begun), signs) ** 2
    # A random sign matrix has about (√m + √n)² at the head of its spectrum; eight of these over m n.
    assert left > 0.9 * 8 * (np.sqrt(m) + np.sqrt(n)) ** 2 / (m * n)


def test_a_sign_matrix_of_rank_1_still_gives_orthonormal_factors() -> None:
    begun = start(np.ones((12, 9), np.float32), 4, 1.0)
    assert skew(begun) <= 1e-6
    assert np.diag(begun.r_rr) == pytest.approx([np.sqrt(108), 0, 0, 0], abs=1e-5)
    sampled = randomised_svd(np.ones((120, 90), np.float32), 4)
    assert np.abs(sampled.u_mq.T @ sampled.u_mq - np.eye(4)).max() < 1e-6
    assert np.abs(sampled.v_nq.T @ sampled.v_nq - np.eye(4)).max() < 1e-6
