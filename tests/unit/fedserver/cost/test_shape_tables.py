"""The shipped tables of shapes, against the models themselves built without memory, and tables of a user's own."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fedclient.tasks.digits.network import make_network
from fedcore.errors import InvalidInput
from fedserver.cost.shapes import MODELS, Model, find_model, shapes_of

DIGITS = Path(__file__).parents[4] / "examples" / "shapes-of-digits.toml"

# As their authors publish them in config.json; what is not named is the class's default.
CONFIGS: dict[str, tuple[Any, Any]] = {
    "llama-3.2-3b": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "mistral-7b": (
        MistralForCausalLM,
        MistralConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        ),
    ),
    "gemma-2-9b": (
        Gemma2ForCausalLM,
        Gemma2Config(
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
        ),
    ),
    "bert-base": (
        BertForSequenceClassification,
        BertConfig(
            id2label={0: "entailment", 1: "neutral", 2: "contradiction"},
            vocab_size=28996,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
        ),
    ),
}


def parameters_of(table: Model) -> dict[str, tuple[int, ...]]:
    """Return every parameter that a table says, by name; a tied weight stands under its other name."""
    found: dict[str, tuple[int, ...]] = {}
    for row in table.linear:
        for path in row.paths():
            if row.role != "tied":
                found[f"{path}.weight"] = tuple(row.shape)
            if row.bias:
                found[f"{path}.bias"] = (row.shape[0],)
    return found | {path: tuple(other.shape) for other in table.other for path in other.paths()}


@pytest.mark.parametrize("name", MODELS)
def test_table_is_the_model(name: str) -> None:
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        model: nn.Module = kind(config)
    table = find_model(name)
    said = parameters_of(table)
    assert said == {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    linears = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {path for row in table.linear for path in row.paths()} == linears
    assert (
        sum(shapes_of(table).whole) == sum(map(math.prod, said.values())) == sum(p.numel() for p in model.parameters())
    )


def test_every_table_that_is_shipped_is_listed_and_found_by_the_name_of_the_hub_too() -> None:
    shipped = {path.name for path in files("fedserver.cost").joinpath("models").iterdir()}
    assert shipped == {f"{name}.toml" for name in MODELS}
    for name in MODELS:
        table = find_model(name)
        assert table.name == name
        assert find_model(table.hub.upper()) == table


def test_default_targets_are_those_of_the_papers() -> None:
    def last_parts(name: str) -> set[str]:
        return {matrix.path.rpartition(".")[2] for matrix in shapes_of(find_model(name)).matrices}

    seven = {f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")}
    assert [last_parts(name) for name in MODELS] == [seven, seven, seven, {"query", "value"}]


def test_targets_are_patterns_of_paths_or_last_parts() -> None:
    table = find_model("bert-base")
    assert len(shapes_of(table, ["query"]).matrices) == 12
    assert [m.path for m in shapes_of(table, ["*.layer.3.attention.self.*"]).matrices] == [
        f"bert.encoder.layer.3.attention.self.{part}" for part in ("query", "key", "value")
    ]
    assert len(shapes_of(table, ["*"]).matrices) == 12 * 6 + 2
    assert shapes_of(table, ["*"]).heads == ()
    assert shapes_of(table, heads=False).heads == ()


def test_targets_that_match_nothing_or_what_is_tied_are_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"targets \['q_proj'\]: match no linear layer; bert-base has: .*attention\.self\.query"
    ):
        shapes_of(find_model("bert-base"), ["query", "q_proj"])
    with pytest.raises(InvalidInput, match="match lm_head, whose weight is another tensor's too"):
        shapes_of(find_model("gemma-2-9b"), ["*"])
    assert len(shapes_of(find_model("mistral-7b"), ["*"]).matrices) == 225


def test_example_is_the_network_of_the_demo() -> None:
    said = parameters_of(find_model(str(DIGITS)))
    assert said == {path: tuple(p.shape) for path, p in make_network().named_parameters()}


def test_unknown_model_names_the_nearest_and_the_other_way() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean 'llama-3\.2-3b'.*FILE\.toml"):
        find_model("llama-3b")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "not TOML"),
        ("name = 'x'", "linear: is required"),
        ("name = 'x'\nlinear = []", "linear: .*at least 1"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3] }]", r"linear\.0\.shape: .*at least 2"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 0] }]", r"linear\.0\.shape\.1: .*greater than or equal to 1"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 2.5] }]", r"linear\.0\.shape\.1: .*integer"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 2], roll = 'head' }]", "did you mean 'role'"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 2], role = 'neck' }]", "'target', 'head' or 'tied'"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 2], count = 2 }]", "one [*] stands for the number"),
        ("name = 'x'\nlinear = [{ path = 'a.*.*', shape = [3, 2] }]", "one [*] stands for the number"),
        ("name = 'x'\nlinear = [{ path = 'a', shape = [3, 2] }]", "no layer is adapted unless it is named; x has: a"),
    ],
)
def test_faulty_table_is_refused_with_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=problem):
        shapes_of(find_model(str(path)))


def test_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.toml: cannot be read"):
        find_model(str(tmp_path / "none.toml"))
    (tmp_path / "long.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InvalidInput, match="more than 1048576 bytes"):
        find_model(str(tmp_path / "long.toml"))


def test_weights_that_are_trained_whole_are_counted_by_name() -> None:
    table = find_model("bert-base")
    assert shapes_of(table, ["query"], heads=False, beside=["classifier.*"]).heads == (3 * 768, 3)
    assert sum(shapes_of(table, ["query"], beside=["classifier.*", "*LayerNorm*"]).heads) == 2_307 + 25 * 2 * 768
    assert shapes_of(table, alone=["classifier.*"]).whole == (3 * 768, 3)
    assert shapes_of(table, alone=["*"]) == shapes_of(table)
    with pytest.raises(InvalidInput, match=r"trainable \['score\.\*'\]: match no parameter; bert-base has: bert\.enc"):
        shapes_of(table, beside=["classifier.*", "score.*"])
    with pytest.raises(InvalidInput, match=r"match bert\.encoder\.layer\.0\.attention\.self\.query\.bias, of a layer"):
        shapes_of(table, beside=["*.bias"])
