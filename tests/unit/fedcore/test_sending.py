"""What a client sends of the state, and how that becomes a part of the whole, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import InvalidInput
from fedcore.jobfile import AdapterSection
from fedcore.layout import Layout
from fedcore.part import dense_blocks, dense_parts
from fedcore.sending import Sending, spread

M, N, RANK = 3, 5, 4
LORA = Layout.of(
    [
        ("adapter", "x.lora_A.weight", (RANK, N), "float32"),
        ("adapter", "x.lora_B.weight", (M, RANK), "float32"),
        ("model", "head", (2, RANK), "float32"),
        ("model", "one", (), "float32"),
    ]
)
SB = Layout.of(
    [
        ("adapter", "x.lora_R.weight", (RANK, RANK), "float32"),
        ("basis", "x.lora_A.weight", (RANK, N), "float32"),
        ("basis", "x.lora_B.weight", (M, RANK), "float32"),
    ]
)


def sending(name: str = "lora", **params: Any) -> Sending:
    return Sending.of(AdapterSection.model_validate({"name": name, "rank": RANK, **params}))


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in layout.tensors}


def test_a_client_has_the_lowest_rank_that_its_name_matches() -> None:
    found = sending(ranks={"phone-*": 2, "*-old": 1, "van": 3})
    names = ("phone-1", "phone-old", "tram-old", "van", "vans")
    assert [found.rank_of(name) for name in names] == [2, 1, 1, 3, RANK]


def test_what_has_a_rank_is_cut_and_the_rest_is_not() -> None:
    found = sending(ranks={"small": 2})
    assert found.layout(LORA, "large", 0) is LORA
    cut = {"x.lora_A.weight": (2, N), "x.lora_B.weight": (M, 2), "head": (2, RANK), "one": ()}
    assert shapes(found.layout(LORA, "small", 0)) == cut
    assert found.layout(LORA, "small", 0) is found.layout(LORA, "small", 1)
    square = sending("lora-sb", ranks={"small": 2})
    assert shapes(square.layout(SB, "small", 0)) == {"x.lora_R.weight": (2, 2)}
    held = {"x.lora_R.weight": (2, 2), "x.lora_A.weight": (2, N), "x.lora_B.weight": (M, 2)}
    assert shapes(square.narrowed(SB, "small")) == held


def test_factors_in_turn() -> None:
    found = sending("rolora")
    for version in range(4):
        names = shapes(found.layout(LORA, "any", version))
        assert set(names) == {"x.lora_B.weight" if version % 2 == 0 else "x.lora_A.weight", "head", "one"}


def test_an_adapter_that_is_not_known_sends_everything() -> None:
    assert (
        Sending.of(AdapterSection.model_validate({"name": "own", "ranks": "what I like"})).layout(LORA, "x", 3) is LORA
    )


@pytest.mark.parametrize("rank", [0, RANK + 1])
def test_a_rank_out_of_bounds_names_the_pattern_and_the_bound(rank: int) -> None:
    with pytest.raises(InvalidInput, match=rf"adapter.ranks.phone-\*: {rank}, from 1 to the job's rank of {RANK}"):
        sending(ranks={"phone-*": rank})


@given(
    st.sampled_from(["lora", "rolora"]), st.integers(1, RANK), st.integers(0, 1), st.integers(1, 9), st.integers(1, 9)
)
def test_what_is_sent_lands_where_it_belongs_and_the_rest_is_zero(
    name: str, rank: int, version: int, cut: int, block: int
) -> None:
    sent = sending(name, ranks={"small": rank}).layout(LORA, "small", version)
    values = np.random.default_rng(rank).uniform(1, 2, sent.num_values).astype(np.float32)
    expected = {
        key: np.zeros(value.shape, np.float32)
        for key, value in LORA.unflatten(np.zeros(LORA.num_values, np.float32)).items()
    }
    for key, value in sent.unflatten(values).items():
        for place in np.ndindex(value.shape):
            expected[key][place] = value[place]
    blocks = [values[start : start + cut] for start in range(0, values.size, cut)]
    found = np.concatenate(list(dense_blocks(spread(dense_parts(blocks), sent, LORA), block)))
    np.testing.assert_array_equal(found, LORA.flatten(expected))
