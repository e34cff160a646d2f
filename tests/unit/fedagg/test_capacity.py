from __future__ import annotations

import math

import pytest

from fedagg import RULES, Capacity, build_optimizer, build_rule
from fedcore.errors import InvalidInput, UnknownPlugin


@pytest.mark.parametrize(
    ("max_updates", "max_weight", "max_abs", "text"),
    [
        (0, 1, 1.0, "max_updates 0: at least 1"),
        (1, 0, 1.0, "max_weight 0: from 1 to 2147483648"),
        (1, 2**31 + 1, 1.0, "max_weight 2147483649"),
        (1, 1, 0.0, "max_abs 0.0"),
        (1, 1, -1.0, "max_abs -1.0"),
        (1, 1, math.inf, "max_abs inf"),
        (1, 1, math.nan, "max_abs nan"),
        (1, 1, 2.0**101, "max_abs 2.5.*e[+]30: from .* to 1.26.*e[+]30"),
        (1, 1, 1e-39, "max_abs 1e-39"),
        (2**20 + 1, 2**20, 1.0, "need 41 bits .* at most 40: lower"),
    ],
)
def test_capacity_out_of_bounds_is_refused_with_value_and_bound(
    max_updates: int, max_weight: int, max_abs: float, text: str
) -> None:
    with pytest.raises(InvalidInput, match=text):
        Capacity(max_updates, max_weight, max_abs)


def test_a_million_updates_of_a_million_examples_fit() -> None:
    Capacity(1_000_000, 1_000_000, 64.0)


def test_unknown_rule_and_optimiser_name_the_known_ones() -> None:
    with pytest.raises(UnknownPlugin, match=r"'weighted-maen': did you mean 'weighted-mean'\? known: .*weighted-mean"):
        build_rule("weighted-maen", {})
    with pytest.raises(UnknownPlugin, match=r"known: .*adagrad.*adam.*momentum.*none.*yogi"):
        build_optimizer("sgd", {})


def test_rule_is_built_by_name() -> None:
    assert build_rule("weighted-mean", {}) == RULES.get("weighted-mean").configure({})
