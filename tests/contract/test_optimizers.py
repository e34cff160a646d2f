"""What every server optimiser must do, ours or installed: each is tried with its defaults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedagg import OPTIMIZERS, ServerOptimizer
from fedcore.errors import InvalidInput
from fedcore.layout import Vector

CATALOGUE = Path(__file__).parents[2] / "aggregators" / "fedagg" / "README.md"
D = 1003

pytestmark = pytest.mark.parametrize("name", OPTIMIZERS.names())


def make(name: str) -> ServerOptimizer:
    return OPTIMIZERS.get(name).configure({})


def fresh(optimizer: ServerOptimizer, num_values: int = D) -> dict[str, Vector]:
    return {slot: np.full(num_values, optimizer.initial(slot), dtype=np.float32) for slot in optimizer.slots}


def means(num_steps: int, num_values: int = D) -> list[Vector]:
    rng = np.random.default_rng(11)
    return [
        (rng.standard_normal(num_values) * 10.0 ** rng.integers(-6, 3)).astype(np.float32) for _ in range(num_steps)
    ]


def test_optimiser_is_registered_under_its_own_name(name: str) -> None:
    assert OPTIMIZERS.get(name).name == name


def test_catalogue_lists_every_optimiser_of_ours(name: str) -> None:
    if OPTIMIZERS.get(name).__module__.startswith("fedagg."):
        assert f"| `{name}` |" in CATALOGUE.read_text("utf-8")


def test_parameters_survive_json(name: str) -> None:
    optimizer = make(name)
    assert OPTIMIZERS.get(name).configure(json.loads(json.dumps(optimizer.params()))) == optimizer


def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="no-such-parameter"):
        OPTIMIZERS.get(name).configure({"no-such-parameter": 1})


def test_slots_have_distinct_names_and_finite_fills(name: str) -> None:
    optimizer = make(name)
    assert len(set(optimizer.slots)) == len(optimizer.slots)
    assert all(np.isfinite(np.float32(optimizer.initial(slot))) for slot in optimizer.slots)


def test_unknown_slot_has_no_fill(name: str) -> None:
    with pytest.raises(ValueError, match="no slot 'no-such-slot'"):
        make(name).initial("no-such-slot")


@pytest.mark.parametrize("block_values", [1, 3, 16, 1000])
def test_steps_by_block_have_the_bits_of_steps_of_the_whole(name: str, block_values: int) -> None:
    optimizer = make(name)
    whole, cut = fresh(optimizer), fresh(optimizer)
    for version, mean in enumerate(means(5), start=1):
        expected = optimizer.step(mean, whole, version)
        parts = [
            optimizer.step(
                mean[start : start + block_values],
                {slot: values[start : start + block_values] for slot, values in cut.items()},
                version,
            )
            for start in range(0, D, block_values)
        ]
        assert np.concatenate(parts).tobytes() == expected.tobytes()
    assert {slot: values.tobytes() for slot, values in cut.items()} == {
        slot: values.tobytes() for slot, values in whole.items()
    }


def test_step_is_a_new_float32_vector_and_leaves_the_mean_alone(name: str) -> None:
    optimizer = make(name)
    (mean,) = means(1)
    before = mean.tobytes()
    mean.flags.writeable = False
    slots = fresh(optimizer)
    step = optimizer.step(mean, slots, 1)
    assert step.dtype == np.float32
    assert step.shape == (D,)
    assert not any(np.shares_memory(step, other) for other in (mean, *slots.values()))
    assert mean.tobytes() == before


def test_first_step_goes_where_the_mean_points(name: str) -> None:
    optimizer = make(name)
    (mean,) = means(1)
    np.testing.assert_array_equal(np.sign(optimizer.step(mean, fresh(optimizer), 1)), np.sign(mean))


def test_nothing_learned_moves_nothing(name: str) -> None:
    optimizer = make(name)
    slots = fresh(optimizer)
    for version in (1, 2, 3):
        assert not optimizer.step(np.zeros(D, np.float32), slots, version).any()


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-80, 1.0, 2.0**40])
def test_steps_and_state_stay_finite_at_extremes(name: str, scale: float) -> None:
    optimizer = make(name)
    slots = fresh(optimizer)
    signs = np.where(np.arange(D) % 2, 1, -1)
    for version in range(1, 30):
        step = optimizer.step((scale * signs).astype(np.float32), slots, version)
        assert np.isfinite(step).all()
    assert all(np.isfinite(values).all() for values in slots.values())
