"""LoRA on real architectures: which layers it takes, which it refuses, and that peft computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedclient.adapters.lora import Lora
from fedclient.adapters.targets import find_targets
from fedcore.adapters import lora_modules
from fedcore.errors import InvalidInput
from tests.support.exports import export

TOKENS = torch.arange(1, 31).reshape(2, 15)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return make().eval()


def llama(**keys: Any) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads, **keys)))


def bert() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 3}
    return seeded(lambda: BertForSequenceClassification(BertConfig(**sizes)))


def gpt2() -> nn.Module:
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(TOKENS).logits
    return result


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, ["*"]),
        (llama, ["q_proj", "*.down_proj"]),
        (bert, ["query", "value", "*.dense"]),
        (gpt2, ["c_attn", "c_proj", "c_fc"]),
    ],
)
def test_peft_loads_what_was_trained_and_gives_the_same_logits(
    make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    params: dict[str, object] = {"rank": 8, "alpha": 20.0, "targets": targets}
    model = Lora(params).attach(make(), 1)
    model.write(np.random.default_rng(0).normal(0, 0.1, model.layout.num_values).astype(np.float32))
    loaded = PeftModel.from_pretrained(make(), export(model, {"name": "lora", **params}, tmp_path / "out").folder)
    ours = logits(model.module)
    torch.testing.assert_close(logits(loaded), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(make()), ours, atol=1e-2)
    # Every tensor found its place, and there is none besides.
    assert sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name) == model.layout.num_values


def test_conv1d_is_a_linear_layer_that_lies_transposed() -> None:
    layout = Lora({"rank": 4, "targets": ["c_attn"]}).attach(gpt2(), 1).layout
    assert {t.name: t.shape for t in layout.tensors if ".0." in t.name} == {
        "transformer.h.0.attn.c_attn.lora_A.weight": (4, 32),
        "transformer.h.0.attn.c_attn.lora_B.weight": (96, 4),
    }


@pytest.mark.parametrize("make", [gpt2, lambda: llama(tie_word_embeddings=True)], ids=["gpt2", "llama"])
def test_tied_head_is_refused_and_the_other_layers_are_named(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(InvalidInput, match=r"match lm_head, one weight that is used as .*\.w.*, lm_head") as raised:
        Lora({}).attach(make(), 1)
    candidates = str(raised.value).partition("name others of: ")[2].split(", ")
    assert "lm_head" not in candidates
    # What is named can be written into the job.
    assert len(lora_modules(Lora({"targets": candidates}).attach(make(), 1).layout)) == (8 if make is gpt2 else 84)


def test_layer_in_two_places_is_refused() -> None:
    layer = nn.Linear(8, 8)
    with pytest.raises(InvalidInput, match=r"match 0, one weight that is used as 0\.weight, 2\.weight"):
        Lora({}).attach(nn.Sequential(layer, nn.ReLU(), layer), 1)


def test_each_pattern_must_match_and_layers_of_all_blocks_are_named_once() -> None:
    with pytest.raises(InvalidInput) as raised:
        Lora({"targets": ["q_proj", "query", "W_*"]}).attach(llama(), 1)
    text = str(raised.value)
    assert text.startswith("adapter.targets ['query', 'W_*']: match no linear layer; the model has: ")
    assert text.count("model.layers.*.self_attn.q_proj") == 1
    assert text.endswith("model.layers.*.mlp.down_proj, lm_head")


def test_model_without_linear_layers_says_so() -> None:
    with pytest.raises(InvalidInput, match="the model has: none inside another module"):
        Lora({}).attach(nn.Linear(8, 8), 1)


@pytest.mark.parametrize(("rank", "is_refused"), [(3, False), (4, True)])
def test_rank_above_the_smaller_side_of_a_layer_is_refused(rank: int, is_refused: bool) -> None:
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
    if is_refused:
        with pytest.raises(InvalidInput, match=r"adapter\.rank 4: above 3, .* 1 with 3 outputs and 5 inputs .*: 0$"):
            find_targets(model, ["*"], rank)
    else:
        assert [(t.path, t.num_outputs, t.num_inputs) for t in find_targets(model, ["*"], rank)] == [
            ("0", 5, 9),
            ("1", 3, 5),
        ]


def test_factors_beside_a_half_precision_base_are_float32_and_the_output_is_not() -> None:
    model = Lora({"rank": 2}).attach(nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16), 1)
    assert {tensor.dtype for tensor in model.layout.tensors} == {"float32"}
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    before = model.module(x)
    model.write(np.ones(model.layout.num_values, dtype=np.float32))
    assert model.module(x).dtype is torch.bfloat16
    # alpha / rank · B A x = 8 · 2 · 8
    torch.testing.assert_close(model.module(x), before + 128, rtol=2**-7, atol=0)
