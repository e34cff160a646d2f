from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclient.tasks.partition import Partition, Rows, deal_by_value, deal_dirichlet, deal_evenly
from fedcore.errors import InvalidInput
from fedcore.params import parse_params
from fedcore.rng import stream

Deal = Callable[[Sequence[str], int, int], list[Rows]]
DEALS: dict[str, Deal] = {
    "even": lambda values, shards, seed: deal_evenly(len(values), shards, stream(seed, "deal")),
    "dirichlet": lambda values, shards, seed: deal_dirichlet(values, shards, 0.3, stream(seed, "deal")),
    "by value": lambda values, shards, seed: deal_by_value(values, shards),
}


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS.keys())
@given(
    values=st.lists(st.sampled_from("abcde"), min_size=5, max_size=60).map(lambda rest: [*"abcde", *rest]),
    shards=st.integers(1, 5),
    seed=st.integers(0, 2**53),
)
def test_every_row_is_in_exactly_one_shard_and_no_shard_is_empty(
    deal: Deal, values: list[str], shards: int, seed: int
) -> None:
    dealt = deal(values, shards, seed)
    assert len(dealt) == shards
    assert min(map(len, dealt)) > 0
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(values)))
    again = deal(values, shards, seed)
    assert all(np.array_equal(one, other) for one, other in zip(dealt, again, strict=True))


def test_even_shards_differ_by_one_row_and_are_mixed() -> None:
    dealt = deal_evenly(103, 4, stream(1, "deal"))
    assert sorted(map(len, dealt)) == [25, 26, 26, 26]
    assert all(part.min() < 20 and part.max() > 80 for part in dealt)


def test_values_stay_together_and_go_around() -> None:
    values = [*"dacb", *"abcd"]
    dealt = deal_by_value(values, 3)
    assert [{values[row] for row in part} for part in dealt] == [{"a", "d"}, {"b"}, {"c"}]


@pytest.mark.parametrize(("alpha", "low", "high"), [(1000.0, 0.45, 0.55), (0.05, 0.9, 1.0)])
def test_small_alpha_skews_labels_and_large_alpha_does_not(alpha: float, low: float, high: float) -> None:
    labels = ["a", "b"] * 2000
    dealt = deal_dirichlet(labels, 4, alpha, stream(3, "deal"))
    # How pure each shard is, weighted by its size.
    purity = sum(max(Counter(labels[row] for row in part).values()) for part in dealt) / len(labels)
    assert low <= purity <= high


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS.keys())
def test_more_shards_than_there_is_to_deal_are_refused(deal: Deal) -> None:
    with pytest.raises(InvalidInput, match=r"3 (rows|different values) are too few for 4 shards"):
        deal(["a", "b", "c"], 4, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "dirichlet"}, "kind 'dirichlet' needs a column"),
        ({"kind": "column"}, "kind 'column' needs a column"),
        ({"kind": "iid", "column": "x"}, "kind 'iid' takes no column"),
        ({"kind": "files", "column": "x"}, "kind 'files' takes no column"),
        ({"kind": "dirichlet", "column": "x", "alpha": 0.0}, "alpha: .*greater than 0"),
        ({"kind": "random"}, "kind: .*'iid', 'dirichlet', 'column' or 'files'"),
    ],
)
def test_partition_that_does_not_fit_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_params(Partition, keys, "task.partition")
