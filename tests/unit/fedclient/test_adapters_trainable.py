"""Weights that are trained whole, chosen by name: alone, or beside an adapter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedclient.adapters import ADAPTERS
from fedclient.adapters.base import AdaptedModel
from fedcore.adapters import FULL_GROUP, adapted_modules
from fedcore.errors import InvalidInput
from fedcore.jobfile import parse_job
from fedcore.layout import BASIS_GROUP, Layout
from fedsim.simulation import make_clients, simulate
from tests.support.text_models import mood_rows, save_bert, seeded, write_jsonl

BESIDE = ("lora", "ffa-lora", "lora-sb")


def bert() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model: nn.Module = seeded(
        lambda: BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32))
    )
    return model


def llama(*, tied: bool = True) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    model: nn.Module = seeded(lambda: LlamaForCausalLM(config))
    return model


def attach(model: nn.Module, adapter: str, **params: object) -> AdaptedModel:
    query = "query" if isinstance(model, BertForSequenceClassification) else "q_proj"
    keys = {"targets": [query], "rank": 2} if adapter in BESIDE else {}
    return ADAPTERS.get(adapter)({**keys, **params}).attach(model, 1)


def names(model: AdaptedModel) -> list[str]:
    return [tensor.name for tensor in model.layout.tensors if tensor.group == FULL_GROUP]


@pytest.mark.parametrize("adapter", [*BESIDE, "full"])
def test_weights_keep_name_shape_and_value_and_stand_between_adapter_and_basis(adapter: str) -> None:
    model = attach(bert(), adapter, trainable=["classifier.*", "*encoder.layer.1.output.LayerNorm*"])
    expected = [
        "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert.encoder.layer.1.output.LayerNorm.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    assert names(model) == expected
    groups = [tensor.group for tensor in model.layout.tensors]
    assert sorted(groups, key=["adapter", FULL_GROUP, BASIS_GROUP].index) == groups
    base = dict(bert().named_parameters())
    values = model.layout.moving.unflatten(model.read())
    for name in expected:
        np.testing.assert_array_equal(values[FULL_GROUP, name], base[name].detach().numpy())
    if adapter != "full":
        assert list(adapted_modules(model.layout)) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]


def test_all_of_a_model_is_what_full_trains_unless_told_otherwise() -> None:
    assert names(attach(bert(), "full")) == [name for name, _ in bert().named_parameters()]
    assert names(attach(llama(), "full"))[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names(attach(llama(), "full"))


@pytest.mark.parametrize("adapter", [*BESIDE, "full"])
def test_pattern_that_matches_nothing_names_what_there_is(adapter: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        attach(bert(), adapter, trainable=["classifier.*", "score.*"])
    text = str(raised.value)
    assert text.startswith("adapter.trainable ['classifier.*', 'score.*']: score.* matches no parameter that can be")
    assert "bert.encoder.layer.*.attention.output.dense.weight" in text
    assert ("bert.encoder.layer.*.attention.self.query.weight" in text) is (adapter == "full")


@pytest.mark.parametrize("pattern", ["*.query.weight", "*.query.bias", "*"])
def test_parameter_of_an_adapted_layer_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidInput, match=r"self\.query\.\w+ is of a layer that adapter\.targets match"):
        attach(bert(), "lora", trainable=[pattern])


def test_tied_weight_is_trained_under_all_its_names_or_none() -> None:
    with pytest.raises(InvalidInput, match=r"lm_head\.weight is also model\.embed_tokens\.weight: match all of these"):
        attach(llama(), "full", trainable=["lm_head.*"])
    both = attach(llama(), "full", trainable=["lm_head.*", "*embed_tokens*"])
    assert names(both) == ["model.embed_tokens.weight"]
    with pytest.raises(InvalidInput, match=r"one weight that is used as .*, lm_head\.weight; beside it the model has"):
        attach(llama(), "lora", trainable=["lm_head.*", "*embed_tokens*"])
    assert names(attach(llama(tied=False), "lora", trainable=["lm_head.*"])) == ["lm_head.weight"]


def test_numbers_that_are_no_floats_are_passed_over_or_refused_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    assert names(attach(model, "full")) == ["0.weight", "0.bias"]
    with pytest.raises(
        InvalidInput, match=r"codes matches no parameter that can be trained; the model has: \*\.weight"
    ):
        attach(model, "full", trainable=["codes"])


@pytest.mark.parametrize("adapter", [*BESIDE, "full"])
def test_job_trains_a_fresh_head_with_the_rest(adapter: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    keys = {"targets": ["query", "value"], "rank": 4} if adapter in BESIDE else {}
    job = parse_job(
        {
            "job": {"name": "moods", "rounds": 3, "seed": 2},
            "task": {
                "name": "hf-sequence-classification",
                "model": "small",
                "max_length": 32,
                "labels": ["bad", "good"],
            },
            "adapter": {"name": adapter, "trainable": ["classifier.*", "*.LayerNorm.*"], **keys},
            "training": {"batch_size": 8, "learning_rate": 0.003, "local_epochs": 4},
            "schedule": {"cohort": 2},
        },
        "test",
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", mood_rows(90))
    data = {"model": str(save_bert(tmp_path / "bert")), "path": str(rows), "held_out": "0.5"}
    simulated = asyncio.run(simulate(job, make_clients(job, 2, data)))
    losses = [row["evaluation"]["loss"] for row in simulated.history]
    assert losses[-1] < losses[0] - 0.03
    layout = Layout.from_json(simulated.layout)
    values = layout.unflatten(np.frombuffer(simulated.state, "<f4"))
    norm = values[FULL_GROUP, "bert.encoder.layer.0.output.LayerNorm.weight"]
    assert 0 < np.abs(norm - 1).max() < 1
    assert values[FULL_GROUP, "classifier.weight"].shape == (2, 32)
