"""What peft reads where modules differ in rank and scale, or are saved whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from fedcore.errors import InvalidInput
from fedcore.layout import TensorSpec
from fedserver.export.factors import Update
from fedserver.export.peft import peft_config, peft_entries
from fedserver.export.weights import safetensors_file


def make_update(rank: int, alpha: float) -> Update:
    rng = np.random.default_rng(rank)
    b_mr, a_rn = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, rank), (rank, 4)))
    return Update(b_mr, a_rn, alpha)


@pytest.mark.parametrize("order", [1, -1])
def test_ranks_and_scales_may_differ_from_module_to_module(order: int, tmp_path: Path) -> None:
    # Without care the pattern for "0" is taken for "1.0" too.
    ranks = {"0": (3, 6.0), "1.0": (2, 5.0), "1.1": (2, 5.0), "10": (1, 5.0)}
    updates = {path: make_update(*ranks[path]) for path in list(ranks)[::order]}

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            layers = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))]
            return nn.Sequential(*layers, *(nn.Identity() for _ in range(8)), nn.Linear(4, 4))

    entries, saved = peft_entries(updates, {}, None)
    assert saved == []
    (tmp_path / "adapter_model.safetensors").write_bytes(b"".join(safetensors_file(entries, {"format": "pt"})))
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(updates, 0.0)))
    dense = make()
    for path, update in updates.items():
        layer = dense.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight += torch.from_numpy(update.b_mr @ update.a_rn) * (update.alpha / update.rank)
    inputs = torch.linspace(-1, 1, 12).reshape(3, 4)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()(inputs)
        torch.testing.assert_close(loaded, dense(inputs), rtol=1e-5, atol=1e-5)


def whole(*names: str) -> dict[str, tuple[TensorSpec, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    return {name: (TensorSpec("model", name, (2,), "float32", 0), np.zeros(2, np.float32)) for name in names}


def test_module_inside_one_that_is_saved_whole_is_saved_with_it() -> None:
    _, saved = peft_entries({"x": make_update(2, 2.0)}, whole("a.token", "a.b.weight", "c.weight"), None)
    assert saved == ["a", "c"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["token"], "a weight that was trained is in none: choose --format weights"),
        (["block.token"], r"peft would save block\.0\.up in it: choose --format"),
        (["up.weight"], r"peft takes block\.0\.up for up"),
        (["norm.bias"], "of norm only the bias was trained"),
    ],
)
def test_what_peft_cannot_hold_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        peft_entries({"block.0.up": make_update(2, 2.0)}, whole(*names), None)
