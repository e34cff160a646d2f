"""DP-SGD on small transformers: gradients of single examples, whatever is trained of which model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedclient.adapters.base import AdaptedModel
from fedclient.tasks.base import Split
from fedclient.tasks.hf.causal_lm import HfCausalLm
from fedclient.tasks.hf.classification import HfSequenceClassification
from fedclient.tasks.hf.encoding import IGNORED
from fedclient.tasks.hf.task import HfTask
from fedcore.errors import InvalidInput
from tests.support.private import adapted, expected_sum, one_by_one, step_of
from tests.support.text_models import mood_rows, save_bert, save_gpt2, save_llama, write_jsonl

MODELS = {"llama": save_llama, "gpt2": save_gpt2, "bert": save_bert}
TARGETS = {"llama": ["*_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value", "*.dense"]}
NO_DROPOUT = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads get in each other's way on work as small as this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name, make in MODELS.items():
        make(root / name)
    write_jsonl(root / "rows.jsonl", mood_rows(40))
    return root


def task_of(folder: Path, model: str, **params: Any) -> HfTask:
    options = {"model": str(folder / model), "path": str(folder / "rows.jsonl")}
    if model == "bert":
        labels = {"labels": ["bad", "good"], "max_length": 32}
        return HfSequenceClassification({"model": "org/small", **labels, **params}, options, 5)
    return HfCausalLm({"model": "org/small", "max_length": 32, **params}, options, 5)


def still(model: AdaptedModel) -> AdaptedModel:
    """Draw no masks: an independent calculation would draw others."""
    for module in model.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("llama", "lora"),
        ("llama", "lora-sb"),
        ("llama", "full"),
        ("gpt2", "lora"),
        ("gpt2", "lora-sb"),
        ("bert", "lora"),
        ("bert", "lora-sb"),
    ],
)
def test_a_step_adds_up_clipped_gradients_of_single_texts(folder: Path, model: str, adapter: str) -> None:
    task = task_of(folder, model)
    params: dict[str, Any] = {} if adapter == "full" else {"rank": 4, "targets": TARGETS[model]}
    if model == "bert":
        params["trainable"] = ["classifier.*"]
    data = task.load().train
    some = Split(data.inputs[:7], data.targets[:7])
    one = still(adapted(task, adapter, params))
    examples_ND = one_by_one(task, one, some)
    clip = float(examples_ND.norm(dim=1).median())
    found = step_of(task, one, some, clip, 3)
    torch.testing.assert_close(found, expected_sum(examples_ND, clip), rtol=1e-3, atol=1e-3 * clip)


def test_a_text_with_nothing_to_predict_counts_as_zero(folder: Path) -> None:
    task = task_of(folder, "llama")
    data = task.load().train
    targets = data.targets[:6].clone()
    targets[2] = IGNORED
    model = adapted(task, "lora", {"rank": 4, "targets": TARGETS["llama"]})
    rest = torch.arange(6) != 2
    others_ND = one_by_one(task, model, Split(data.inputs[:6][rest], targets[rest]))
    found = step_of(task, model, Split(data.inputs[:6], targets), 0.5, 3)
    torch.testing.assert_close(found, expected_sum(others_ND, 0.5), rtol=1e-3, atol=1e-4)
    plain = step_of(task, model, Split(data.inputs[:6], targets), math.inf, 3)
    torch.testing.assert_close(plain, others_ND.sum(dim=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("model", "name"), [("gpt2", "wpe"), ("bert", "position_embeddings")])
def test_embeddings_of_positions_are_refused_by_name_and_can_be_trained_one_by_one(
    folder: Path, model: str, name: str
) -> None:
    task = task_of(folder, model)
    data = task.load().train
    some = Split(data.inputs[:4], data.targets[:4])
    one = still(adapted(task, "full", {}))
    with pytest.raises(
        InvalidInput, match=rf"{name}\.weight: gradients of single examples cannot be told apart; .*batch_size = 1"
    ):
        step_of(task, one, some, 0.5, 2)
    found = step_of(task, one, some, 0.5, 1)
    torch.testing.assert_close(found, expected_sum(one_by_one(task, one, some), 0.5), rtol=1e-3, atol=1e-4)


def test_activations_that_are_computed_twice_are_refused_with_advice(folder: Path) -> None:
    task = task_of(folder, "llama", gradient_checkpointing=True)
    data = task.load().train
    model = adapted(task, "lora", {"rank": 4, "targets": TARGETS["llama"]})
    with pytest.raises(InvalidInput, match=r"without task\.gradient_checkpointing"):
        step_of(task, model, data, 0.5, 4)
    some = Split(data.inputs[:3], data.targets[:3])
    found = step_of(task, model, some, 0.5, 1)
    torch.testing.assert_close(found, expected_sum(one_by_one(task, model, some), 0.5), rtol=1e-3, atol=1e-4)


def test_dropout_is_applied_to_each_example_as_in_the_forward_pass(folder: Path) -> None:
    """Gradients of single examples add up to that of the batch, which the check before training compares."""
    task = task_of(folder, "llama")
    data = task.load().train
    for adapter in ("lora", "lora-sb"):
        model = adapted(task, adapter, {"rank": 4, "targets": TARGETS["llama"], "dropout": 0.5})
        assert step_of(task, model, data, 0.5, 8).any()
