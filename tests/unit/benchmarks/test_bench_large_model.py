from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.large_model import CPU, GRADIENTS, SERVER_ROWS, WAYS, joined, measure, parse, tables, update_figures
from benchmarks.large_model_steps import Bench, config_of
from fedcore.messages import MESSAGE_BYTES
from fedserver.cost.shapes import find_model

LINEAR = {
    "self_attn.q_proj": [32, 32],
    "self_attn.k_proj": [16, 32],
    "self_attn.v_proj": [16, 32],
    "self_attn.o_proj": [32, 32],
    "mlp.gate_proj": [64, 32],
    "mlp.up_proj": [64, 32],
    "mlp.down_proj": [32, 64],
}
BLOCKS, RANK, LORA_RANK = 2, 8, 4
TRAINED = {
    "lora-sb": BLOCKS * len(LINEAR) * RANK**2,
    "lora": BLOCKS * sum(LORA_RANK * (m + n) for m, n in LINEAR.values()),
}
TRAINED["peft"] = TRAINED["lora"]
NUMBERS = ("warm-up 1", "steps 2", "passes 1", "repeats 2", "samples 4", "batch 2", "length 16")

# PEFT asks the model in a way that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = [
        f'{{ path = "model.layers.*.{path}", shape = {shape}, count = {BLOCKS}, role = "target" }},'
        for path, shape in LINEAR.items()
    ]
    norms = [
        f'{{ path = "model.layers.*.{name}_layernorm.weight", shape = [32], count = {BLOCKS} }},'
        for name in ("input", "post_attention")
    ]
    text = ['name = "tiny"', "linear = [", *rows, '{ path = "lm_head", shape = [100, 32], role = "tied" },', "]"]
    text += ["other = [", *norms, '{ path = "model.embed_tokens.weight", shape = [100, 32] },']
    text += ['{ path = "model.norm.weight", shape = [32] },', "]"]
    table = tmp_path / "tiny.toml"
    table.write_text("\n".join(text), encoding="utf-8")
    numbers = [*NUMBERS, f"rank {RANK}", f"lora-rank {LORA_RANK}", "head-dim 8"]
    return ["--device", "cpu", "--model", str(table), *(part for each in numbers for part in f"--{each}".split())]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_its_own_weights_and_no_others(arguments: list[str], way: str) -> None:
    bench = Bench(parse([*arguments, "--checkpointing"]), way)
    trained = {id(parameter) for parameter in bench.adapted.parameters}
    before = {name: value.detach().clone() for name, value in bench.adapted.module.named_parameters()}
    assert bench.adapted.layout.moving.num_values == TRAINED[way]
    found = bench.step_figures()
    assert len(found["steps_s"]) == 2
    assert len(found["reads_s"]) == 2
    assert min(found["steps_s"] + found["reads_s"]) > 0
    for name, value in bench.adapted.module.named_parameters():
        assert torch.equal(value, before[name]) != (id(value) in trained), name


def test_the_factors_of_lora_sb_are_orthonormal(arguments: list[str]) -> None:
    basis = Bench(parse(arguments), "lora-sb").adapted.basis
    assert len(basis) == 2 * BLOCKS * len(LINEAR)
    for factor in basis.values():
        rows = factor if factor.shape[0] == RANK else factor.T
        torch.testing.assert_close(rows @ rows.T, torch.eye(RANK))


def test_gradients_are_summed_over_the_samples_that_were_asked_for(arguments: list[str]) -> None:
    bench = Bench(parse(arguments), GRADIENTS)
    assert bench.gradient_figures()["gradients_s"]["min"] >= 0
    assert bench.adapted.starts_from_gradients


@pytest.mark.parametrize("name", ["llama-3.2-3b", "mistral-7b"])
def test_tables_of_llamas_architecture_give_a_model_with_their_parameters(name: str) -> None:
    config = config_of(find_model(name), 128, 16)
    assert config.tie_word_embeddings == (name == "llama-3.2-3b")


@pytest.mark.parametrize("name", ["gemma-2-9b", "bert-base"])
def test_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(SystemExit, match="not of Llama's architecture"):
        config_of(find_model(name), 128, 16)


def test_passes_are_joined_and_a_failure_stays() -> None:
    first, second = ({"steps_s": [number], "peak_mib": peak, "device": "cpu"} for number, peak in ((1.0, 5), (2.0, 3)))
    assert joined({}, first) == first
    assert joined(first, second) == {"steps_s": [1.0, 2.0], "peak_mib": 5, "device": "cpu"}
    failed: dict[str, Any] = {"failed": "no memory"}
    assert joined(first, failed) == joined(failed, second) == failed


def test_an_update_too_large_for_one_message_is_timed_too() -> None:
    sizes = [MESSAGE_BYTES // 4] * 2
    found = update_figures(sizes, "raw", 1)
    assert found["bytes"] > 2 * MESSAGE_BYTES - 8
    assert found["send_s"]["min"] > 0


@pytest.mark.slow
def test_one_command_gives_everything(arguments: list[str]) -> None:
    found = measure([*arguments, "--ways", "peft", "--codecs", "int8"])
    assert found == json.loads(json.dumps(found))
    assert {"commit", "torch", "peft", "cpu"} <= found["machine"].keys()
    row = found["steps"]["peft"]
    assert row["trained"] == TRAINED["peft"]
    assert min(row["tokens_per_s"], row["step_s"]["min"], row["before_mib"]) > 0
    assert row["peak_mib"] >= row["before_mib"]
    assert found["gradients"]["peak_mib"] > 0
    assert [row["values"] for row in found["updates"]] == [TRAINED["lora-sb"], TRAINED["lora"]]
    for row in found["updates"]:
        assert row["server"].keys() == {*SERVER_ROWS, CPU}
        assert min(row["bytes"], row["send_s"]["min"], row["server"]["fold_ms"]["min"]) > 0
    assert sum(row["count"] for row in found["svd"]["shapes"]) == BLOCKS * len(LINEAR)
    assert "| peft | " in tables(found)
    assert "| 1.00 |" in tables(found)
    found["steps"]["peft"] = {"failed": "peft: exit status 1: out of memory"}
    assert "| peft | peft: exit status 1: out of memory |" in tables(found)
