"""What the low-rank algebra refuses, and in what words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fedagg.lowrank import (
    Factors,
    Matrix,
    combine,
    mean_of_factors,
    norm_weights,
    padded_mean,
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
from fedcore.errors import InvalidInput
from tests.support.factors import crowd, draw

Method = Callable[[Sequence[Factors], Sequence[float]], object]

METHODS: dict[str, Method] = {
    "fedit": mean_of_factors,
    "flora": stack,
    "fedex": residual,
    "flexlora": lambda clients, weights: redistribute(clients, weights, [(1, 1.0)]),
    "hetlora": padded_mean,
    "lora-fair": refined_mean,
}
SAME_SCALE = [name for name in METHODS if name not in ("flora", "flexlora")]
SAME_RANK = [name for name in SAME_SCALE if name != "hetlora"]


def ones(*shape: int) -> Matrix:
    return np.ones(shape, dtype=np.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_value_that_is_not_finite_is_refused_with_its_place(factor: str, value: float) -> None:
    b_mr, a_rn = ones(4, 2), ones(2, 3)
    (b_mr if factor == "B" else a_rn)[1, 0] = value
    with pytest.raises(InvalidInput, match=f"{factor} has {value} in row 1, column 0: every value is finite"):
        Factors(b_mr, a_rn)


@pytest.mark.parametrize(
    ("b_mr", "a_rn", "scale", "text"),
    [
        (ones(4, 2), ones(3, 5), 1.0, "B 4 × 2 and A 3 × 5: B's columns"),
        (ones(4), ones(1, 5), 1.0, "B of float32 and shape 4: a float32 matrix"),
        (ones(4, 2).astype(np.float64), ones(2, 5), 1.0, "B of float64 and shape 4 × 2"),
        (ones(4, 2), ones(2, 5).astype(np.float16), 1.0, "A of float16 and shape 2 × 5"),
        (ones(0, 2), ones(2, 5), 1.0, "adapted matrix of 0 × 5: at least 1 × 1"),
        (ones(4, 2), ones(2, 5), 0.0, "scale 0.0: positive and finite"),
        (ones(4, 2), ones(2, 5), -1.0, "scale -1.0"),
        (ones(4, 2), ones(2, 5), math.nan, "scale nan"),
        (ones(4, 2), ones(2, 5), math.inf, "scale inf"),
    ],
)
def test_what_are_no_factors_is_refused(b_mr: Any, a_rn: Any, scale: float, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Factors(b_mr, a_rn, scale)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([0.0, 0.0], "the weights of 2 clients are all 0"),
        ([1.0, -1.0], "weight -1.0 of client 1: finite and not negative"),
        ([math.nan, 1.0], "weight nan of client 0"),
        ([1.0, math.inf], "weight inf of client 1"),
        ([1.0], "1 weights for 2 clients"),
        ([], "0 weights for 2 clients"),
    ],
)
def test_weights_without_a_mean_are_refused(name: str, weights: list[float], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        METHODS[name](crowd(1, 4, 5, [2, 2]), weights)


@pytest.mark.parametrize("name", METHODS)
def test_no_clients_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="0 weights for 0 clients"):
        METHODS[name]([], [])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("weight", [1.0, 0.0])  # who has no weight is looked at too
def test_clients_that_do_not_fit_are_refused(name: str, weight: float) -> None:
    rng = np.random.default_rng(2)
    first = draw(rng, 4, 5, 2)
    with pytest.raises(InvalidInput, match="client 1 adapts 5 × 4, client 0 4 × 5: the same matrix"):
        METHODS[name]([first, draw(rng, 5, 4, 2)], [1, weight])
    if name != "hetlora":
        with pytest.raises(InvalidInput, match="client 1: rank 5: from 1 to 4, the smaller side of 4 × 5"):
            METHODS[name]([first, draw(rng, 4, 5, 5)], [1, weight])
        with pytest.raises(InvalidInput, match="client 1: rank 0: from 1 to 4"):
            METHODS[name]([first, draw(rng, 4, 5, 0)], [1, weight])


@pytest.mark.parametrize("name", SAME_SCALE)
def test_averages_of_factors_want_one_scale(name: str) -> None:
    rng = np.random.default_rng(3)
    with pytest.raises(InvalidInput, match=r"client 1 has rank 2 and scale 2.0, client 0 2 and 1.0: the same"):
        METHODS[name]([draw(rng, 4, 5, 2), draw(rng, 4, 5, 2, 2.0)], [1, 1])


@pytest.mark.parametrize("name", SAME_RANK)
def test_averages_of_factors_want_one_rank(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"client 1 has rank 3 and scale 1.0, client 0 2 and 1.0: the same"):
        METHODS[name](crowd(4, 4, 5, [2, 3]), [1, 1])


def test_hetlora_refuses_ranks_that_no_adapter_of_the_matrix_can_have() -> None:
    with pytest.raises(InvalidInput, match="padded rank 5: from 1 to 4"):
        padded_mean(crowd(5, 4, 5, [2, 5]), [1, 1])


def test_hetlora_of_updates_that_are_all_0_has_no_weights() -> None:
    still = [Factors(np.zeros((4, 2), np.float32), ones(2, 5))] * 2
    with pytest.raises(InvalidInput, match="are all 0"):
        padded_mean(still, norm_weights(still))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda part: zero_pad(part, 1), "padded rank 1: at least 2, the rank there is"),
        (lambda part: zero_pad(part, 5), "padded rank 5: from 1 to 4"),
        (lambda part: recompress(part, 1.0), "tolerance 1.0: from 0 to below 1"),
        (lambda part: recompress(part, -0.1), "tolerance -0.1"),
        (lambda part: recompress(part, math.nan), "tolerance nan"),
        (lambda part: recompress(part, norm=-1.0), "norm -1.0: at least 0 and finite"),
        (lambda part: refined_mean([part], [1], -1.0), "penalty -1.0: at least 0"),
        (lambda part: refined_mean([part], [1], math.inf), "penalty inf"),
        (lambda part: redistribute([part], [1], [(5, 1.0)]), "receiver's rank 5: from 1 to 4"),
        (lambda part: redistribute([part], [1], [(0, 1.0)]), "receiver's rank 0: from 1 to 4"),
        (lambda part: redistribute([part], [1], [(1, 0.0)]), "receiver's scale 0.0: positive and finite"),
        (lambda part: combine([part], []), "0 coefficients for 1 matrices"),
        (lambda _: combine([], []), "0 coefficients for 0 matrices"),
        (lambda part: combine([part], [math.nan]), r"coefficients \[nan\]: finite"),
        (lambda part: combine([part, draw(np.random.default_rng(1), 5, 5, 1)], [1, 1]), "matrices of shapes"),
        (lambda part: combine([part], [1e300]), "B has -?inf in row"),
    ],
)
def test_a_parameter_out_of_bounds_is_refused_with_its_bound(call: Callable[[Factors], object], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        call(draw(np.random.default_rng(7), 4, 5, 2))


def test_a_result_beyond_float32_is_refused() -> None:
    huge = Factors(ones(4, 2) * np.float32(3e38), ones(2, 5) * np.float32(3e38))
    with pytest.raises(InvalidInput, match=r"B has -?inf"):
        recompress(huge)


@pytest.mark.parametrize(
    ("total", "rank", "eta0", "text"),
    [
        (np.zeros((4, 5)), 2, 0.1, "gradient sum is 0 everywhere"),
        (ones(4, 5), 5, 0.1, "rank 5: from 1 to 4, the smaller side of 4 × 5"),
        (ones(4, 5), 0, 0.1, "rank 0: from 1 to 4"),
        (ones(0, 5), 1, 0.1, "rank 1: from 1 to 0"),
        (ones(4), 1, 0.1, "gradient sum of shape 4: a matrix of finite values"),
        (ones(4, 5) * np.float32(np.nan), 1, 0.1, "a matrix of finite values"),
        (ones(4, 5), 1, 0.0, "eta0 0.0: positive and finite"),
        (ones(4, 5), 1, math.nan, "eta0 nan"),
        (ones(4, 5), 1, math.inf, "eta0 inf"),
        (ones(4, 5), 1, 1e-300, "eta0 1e-300: R would be 0.0 in float32"),
        (ones(4, 5), 1, 1e300, r"eta0 1e\+300: R would be inf in float32"),
    ],
)
def test_a_start_without_a_basis_is_refused(total: Any, rank: int, eta0: float, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        start(total, rank, eta0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: truncated_svd(ones(3, 4), 4), "rank 4: from 1 to 3"),
        (lambda: randomised_svd(ones(3, 4), 0), "rank 0: from 1 to 3"),
        (lambda: randomised_svd(ones(3, 4), 1, oversampling=-1), "oversampling -1, power iterations 10: at least 0"),
    ],
)
def test_a_decomposition_of_what_does_not_fit_is_refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        call()
