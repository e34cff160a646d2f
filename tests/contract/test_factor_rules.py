"""What every rule over low-rank factors must do, ours or installed: each is tried with its defaults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedagg import RULES, FactorRule, Merged
from fedagg.lowrank import Factors
from fedcore.errors import InvalidInput
from tests.support.factors import Dense, crowd, dense, dense_mean, distance

CATALOGUE = Path(__file__).parents[2] / "aggregators" / "fedagg" / "README.md"
SCALE = 2.0
RANK = 4
EXACT = ("fedex-lora", "flora")

pytestmark = pytest.mark.parametrize(
    "name", [name for name in RULES.names() if RULES.get(name).traits.shape == "factors"]
)


def make(name: str) -> FactorRule:
    rule = RULES.get(name).configure({})
    assert isinstance(rule, FactorRule)
    return rule


def merge(name: str, clients: Sequence[Factors], weights: Sequence[int], seed: int = 0) -> Merged:
    base = crowd(1, *clients[0].shape, [RANK], SCALE)[0]
    return make(name).merge(base, clients, weights, np.random.default_rng(seed))


def applied(merged: Merged) -> Dense:
    """Return what is added to the frozen matrix as it was, of which the new factors are a part."""
    return dense(merged.factors) + (0.0 if merged.change is None else dense(merged.change))


@pytest.fixture(params=[(24, 15), (15, 24), (20, 20)], ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    return found


def test_rule_is_registered_under_its_own_name(name: str) -> None:
    assert RULES.get(name).name == name


def test_catalogue_lists_every_rule_of_ours(name: str) -> None:
    if RULES.get(name).__module__.startswith("fedagg."):
        assert f"| `{name}` |" in CATALOGUE.read_text("utf-8")


def test_parameters_survive_json(name: str) -> None:
    rule = make(name)
    again: dict[str, Any] = json.loads(json.dumps(rule.params()))
    assert RULES.get(name).configure(again) == rule


def test_unknown_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="no_such_parameter"):
        RULES.get(name).configure({"no_such_parameter": 1})


def test_all_go_on_with_factors_like_those_before(name: str, shape: tuple[int, int]) -> None:
    merged = merge(name, crowd(2, *shape, [RANK] * 3, SCALE), [1, 2, 3])
    assert (merged.factors.shape, merged.factors.rank, merged.factors.scale) == (shape, RANK, SCALE)


def test_one_client_gets_back_what_it_has_learned(name: str, shape: tuple[int, int]) -> None:
    (client,) = crowd(2, *shape, [RANK], SCALE)
    assert distance(applied(merge(name, [client], [7])), dense(client)) < 1e-6


def test_an_exact_rule_applies_the_mean_of_the_products_and_no_other_does(name: str, shape: tuple[int, int]) -> None:
    clients, weights = crowd(2, *shape, [RANK] * 5, SCALE), [1, 2, 3, 4, 10]
    away = distance(applied(merge(name, clients, weights)), dense_mean(clients, weights))
    assert away < 1e-6 if name in EXACT else away > 0.1


def test_the_order_of_the_clients_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    clients, weights = crowd(2, *shape, [RANK] * 3, SCALE), [1, 2, 3]
    there, back = merge(name, clients, weights), merge(name, clients[::-1], weights[::-1])
    assert distance(applied(there), applied(back)) < 1e-5


def test_frozen_matrices_change_only_where_the_rule_says_so(name: str, shape: tuple[int, int]) -> None:
    change = merge(name, crowd(2, *shape, [RANK] * 3, SCALE), [1, 1, 1]).change
    assert (change is not None) == make(name).changes_base
    if change is not None:
        assert change.scale == 1


def test_ranks_may_differ_where_the_rule_says_so(name: str, shape: tuple[int, int]) -> None:
    clients = crowd(2, *shape, [1, 3, 2], SCALE)
    if make(name).unequal_ranks:
        merged = merge(name, clients, [1, 1, 1])
        assert merged.factors.rank == RANK
        assert np.isfinite(applied(merged)).all()
    else:
        with pytest.raises(InvalidInput, match="rank"):
            merge(name, clients, [1, 1, 1])


def test_what_is_drawn_follows_from_the_generator_alone(name: str) -> None:
    clients = crowd(2, 9, 7, [RANK] * 2, SCALE)
    one, two = (merge(name, clients, [1, 1]).factors for _ in range(2))
    np.testing.assert_array_equal(one.a_rn, two.a_rn)
    np.testing.assert_array_equal(one.b_mr, two.b_mr)


def test_every_factor_can_still_learn(name: str) -> None:
    """Where a column of B and its row of A are both 0, neither ever gets a gradient."""
    merged = merge(name, crowd(2, 9, 7, [RANK] * 2, SCALE), [1, 1]).factors
    assert (np.linalg.norm(merged.b_mr, axis=0) + np.linalg.norm(merged.a_rn, axis=1) > 0).all()
    if make(name).unequal_ranks:
        merged = merge(name, crowd(2, 9, 7, [1, 2], SCALE), [1, 1]).factors
        assert (np.linalg.norm(merged.b_mr, axis=0) + np.linalg.norm(merged.a_rn, axis=1) > 0).all()
