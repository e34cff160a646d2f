"""The optimisers against the papers' formulas in Python floats, and against torch where torch has the same one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import JsonValue

from fedagg import ServerOptimizer, build_optimizer
from fedcore.errors import InvalidInput
from fedcore.layout import Vector

STEPS = 25
ETA, BETA1, BETA2, TAU = 0.05, 0.8, 0.95, 0.01


def means() -> list[Vector]:
    rng = np.random.default_rng(2)
    return [(rng.standard_normal(20) * 0.1).astype(np.float32) for _ in range(STEPS)]


def run(optimizer: ServerOptimizer) -> Vector:
    slots = {slot: np.full(20, optimizer.initial(slot), dtype=np.float32) for slot in optimizer.slots}
    return np.stack([optimizer.step(mean, slots, version) for version, mean in enumerate(means(), start=1)])


def adagrad(v: float, squared: float) -> float:
    return v + squared


def adam(v: float, squared: float) -> float:
    return BETA2 * v + (1 - BETA2) * squared


def yogi(v: float, squared: float) -> float:
    return v - (1 - BETA2) * squared * math.copysign(1, v - squared)


@pytest.mark.parametrize(
    ("name", "params", "update_v"),
    [("adagrad", {}, adagrad), ("adam", {"beta2": BETA2}, adam), ("yogi", {"beta2": BETA2}, yogi)],
)
def test_adaptive_optimisers_follow_algorithm_2(
    name: str, params: dict[str, JsonValue], update_v: Callable[[float, float], float]
) -> None:
    optimizer = build_optimizer(name, {"learning_rate": ETA, "beta1": BETA1, "tau": TAU, **params})
    steps = run(optimizer)
    for value in range(20):
        m, v = 0.0, TAU**2
        for number, mean in enumerate(means()):
            delta = float(mean[value])
            m = BETA1 * m + (1 - BETA1) * delta
            v = update_v(v, delta * delta)
            assert steps[number, value] == pytest.approx(ETA * m / (math.sqrt(v) + TAU), rel=2e-5, abs=1e-7)


def test_momentum_steps_as_torch_sgd_does() -> None:
    weight = torch.zeros(20, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.3, momentum=0.7)
    steps = run(build_optimizer("momentum", {"learning_rate": 0.3, "momentum": 0.7}))
    for step, mean in zip(steps, means(), strict=True):
        before = weight.detach().clone()
        weight.grad = -torch.from_numpy(mean)
        sgd.step()
        np.testing.assert_allclose(step, (weight.detach() - before).numpy(), rtol=1e-4, atol=1e-6)


def test_no_optimiser_adds_the_mean_bit_for_bit() -> None:
    assert run(build_optimizer("none", {})).tobytes() == np.stack(means()).tobytes()


def test_learning_rate_scales_the_plain_step() -> None:
    np.testing.assert_array_equal(run(build_optimizer("none", {"learning_rate": 0.5})), np.stack(means()) / 2)


def test_momentum_of_zero_is_no_optimiser() -> None:
    assert run(build_optimizer("momentum", {"momentum": 0.0})).tobytes() == run(build_optimizer("none", {})).tobytes()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("none", {"learning_rate": 0.0}),
        ("none", {"learning_rate": -1.0}),
        ("momentum", {"momentum": 1.0}),
        ("adam", {"beta1": 1.0}),
        ("adam", {"beta2": 1.0}),
        ("yogi", {"beta2": -0.1}),
        ("adagrad", {"tau": 0.0}),
        ("adagrad", {"tau": 1e-13}),
        ("adagrad", {"beta2": 0.9}),
    ],
)
def test_parameters_that_the_formulas_forbid_are_refused(name: str, params: dict[str, JsonValue]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(params))):
        build_optimizer(name, params)


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
def test_smallest_tau_still_divides_by_something(name: str) -> None:
    optimizer = build_optimizer(name, {"tau": 1e-12})
    slots = {slot: np.full(3, optimizer.initial(slot), dtype=np.float32) for slot in optimizer.slots}
    for version in range(1, 2000):
        step = optimizer.step(np.zeros(3, np.float32), slots, version)
        assert not step.any()
