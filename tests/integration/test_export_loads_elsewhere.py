"""What is exported, other people's programs load: the model card's own code, run with the real packages."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedclient.adapters import ADAPTERS
from fedclient.adapters.base import AdaptedModel
from fedcore.adapters import FULL_GROUP
from fedserver.export import Exported
from tests.support.exports import export

# peft still asks transformers under the old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]


def mlp() -> nn.Module:
    # A linear layer "0" beside a block whose "0" is none.
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)))


def bert() -> nn.Module:
    model: nn.Module = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )
    return model


def llama() -> nn.Module:
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )
    return model


def gpt2() -> nn.Module:
    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    return model


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    adapter: dict[str, Any]
    inputs: torch.Tensor


TOKENS = torch.arange(1, 31).reshape(2, 15)
VALUES = torch.linspace(-2, 2, 24).reshape(4, 6)
LORA_CASES = {
    "mlp": Case(mlp, {"name": "lora", "rank": 3, "alpha": 12.0, "dropout": 0.3}, VALUES),
    "mlp, one layer": Case(mlp, {"name": "lora", "rank": 1, "alpha": 5.0, "targets": ["1.2"]}, VALUES),
    "bert, attention": Case(
        bert, {"name": "lora", "rank": 4, "alpha": 32.0, "targets": ["query", "value", "*.dense"]}, TOKENS
    ),
    "llama, all layers": Case(llama, {"name": "lora", "rank": 8, "alpha": 4.0}, TOKENS),
    "mlp, ffa-lora": Case(mlp, {"name": "ffa-lora", "rank": 3, "alpha": 12.0, "dropout": 0.3}, VALUES),
    "bert, ffa-lora": Case(bert, {"name": "ffa-lora", "rank": 4, "targets": ["query", "value", "*.dense"]}, TOKENS),
    "mlp, lora-sb": Case(mlp, {"name": "lora-sb", "rank": 3, "dropout": 0.3}, VALUES),
    "bert, lora-sb": Case(bert, {"name": "lora-sb", "rank": 4, "targets": ["query", "*.dense"]}, TOKENS),
    "llama, lora-sb": Case(llama, {"name": "lora-sb", "rank": 8}, TOKENS),
    "bert, lora, head and norms": Case(
        bert,
        {"name": "lora", "rank": 4, "targets": ["query", "value"], "trainable": ["classifier.*", "*LayerNorm*"]},
        TOKENS,
    ),
    "bert, lora-sb, head": Case(
        bert, {"name": "lora-sb", "rank": 4, "targets": ["query"], "trainable": ["classifier.*"]}, TOKENS
    ),
    "llama, ffa-lora, norms and output": Case(
        llama, {"name": "ffa-lora", "rank": 4, "targets": ["*_proj"], "trainable": ["*norm*", "lm_head.*"]}, TOKENS
    ),
    "gpt2, lora, norms": Case(
        gpt2, {"name": "lora", "rank": 4, "targets": ["c_*"], "trainable": ["transformer.ln_f.*"]}, TOKENS
    ),
    "gpt2, lora-sb": Case(gpt2, {"name": "lora-sb", "rank": 4, "targets": ["c_attn", "c_proj", "c_fc"]}, TOKENS),
}
FULL_CASES = {
    "mlp": Case(mlp, {"name": "full"}, VALUES),
    "bert": Case(bert, {"name": "full"}, TOKENS),
}


def build(case: Case) -> nn.Module:
    """Return the same model, in evaluation mode, on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return case.make().eval()


def train(case: Case, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """Return the adapted model with values far from those it began with."""
    params = {key: value for key, value in case.adapter.items() if key != "name"}
    model = ADAPTERS.get(case.adapter["name"])(params).attach(build(case).to(dtype), 1)
    rng, num_moving = np.random.default_rng(0), model.layout.moving.num_values
    drawn_D = rng.normal(0, 0.1, num_moving).astype(np.float32)
    if model.starts_from_gradients:
        shapes = [tensor.shape for tensor in model.layout.tensors[len(model.layout.moving.tensors) :]]
        model.write_basis(np.concatenate([orthonormal(rng.normal(size=shape)).ravel() for shape in shapes]))
        drawn_D *= 3
    model.write(model.read() + drawn_D)
    model.module.eval()
    return model


def orthonormal(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    nearest: npt.NDArray[np.float32] = (u @ vt).astype(np.float32)
    return nearest


def run_snippet(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **names: object) -> nn.Module:
    """Run the card's code in the export's folder and return its `model`."""
    [snippet] = exported.model_card.read_text().split("```python\n")[1:]
    script = tmp_path / "snippet.py"
    script.write_text(snippet.partition("```")[0])
    monkeypatch.chdir(exported.folder)
    model = runpy.run_path(str(script), init_globals=names)["model"]
    assert isinstance(model, nn.Module)
    return model


def logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = model.eval()(inputs)
    result = getattr(output, "logits", output)
    assert isinstance(result, torch.Tensor)
    return result.float()


@pytest.mark.parametrize("case", LORA_CASES.values(), ids=LORA_CASES.keys())
def test_peft_computes_what_our_adapter_computes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(case)
    loaded = run_snippet(export(trained, case.adapter, tmp_path / "out"), tmp_path, monkeypatch, base=build(case))
    ours = logits(trained.module, case.inputs)
    torch.testing.assert_close(logits(loaded, case.inputs), ours, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(build(case), case.inputs), ours, atol=1e-2)
    # Every exported tensor, and none besides, is in the loaded model.
    found = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    factors = (t for t in trained.layout.tensors if t.name.endswith(("lora_A.weight", "lora_B.weight")))
    assert found == sum(tensor.num_values for tensor in factors)
    saved = {name.replace(".modules_to_save.default", "") for name, _ in loaded.named_parameters() if "to_save" in name}
    assert saved == {f"base_model.model.{t.name}" for t in trained.layout.tensors if t.group == FULL_GROUP}


def test_half_precision_weights_are_kept_in_their_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FULL_CASES["bert"]
    trained = train(case, torch.bfloat16)
    assert {tensor.dtype for tensor in trained.layout.tensors} == {"bfloat16"}
    exported = export(trained, case.adapter, tmp_path / "out")
    loaded = run_snippet(exported, tmp_path, monkeypatch, model=build(case).to(torch.bfloat16))
    torch.testing.assert_close(logits(loaded, case.inputs), logits(trained.module, case.inputs), rtol=0, atol=0)


def test_adapter_of_a_half_precision_base_is_float32_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = LORA_CASES["llama, all layers"]
    trained = train(case, torch.bfloat16)
    assert {tensor.dtype for tensor in trained.layout.tensors} == {"float32"}
    exported = export(trained, case.adapter, tmp_path / "out")
    loaded = run_snippet(exported, tmp_path, monkeypatch, base=build(case).to(torch.bfloat16))
    values_D = torch.cat([p.flatten() for name, p in loaded.named_parameters() if "lora_" in name])
    assert torch.equal(values_D.sort().values, torch.from_numpy(trained.read()).sort().values)


@pytest.mark.parametrize("case", FULL_CASES.values(), ids=FULL_CASES.keys())
def test_full_weights_load_into_the_model(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(case)
    exported = export(trained, case.adapter, tmp_path / "out")
    loaded = run_snippet(exported, tmp_path, monkeypatch, model=build(case))
    torch.testing.assert_close(logits(loaded, case.inputs), logits(trained.module, case.inputs), rtol=0, atol=0)
