from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedclient.adapters.full import Full
from fedclient.adapters.lora import Lora
from fedcore.changes import Change
from fedcore.errors import InvalidInput, LayoutError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"value": nn.Linear(4, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block["value"](self.query(x))
        return out


def test_every_linear_layer_gets_a_pair_of_factors_by_default() -> None:
    layout = Lora({"rank": 2}).attach(Net(), 1).layout
    assert [(t.group, t.name, t.shape) for t in layout.tensors] == [
        ("adapter", "query.lora_A.weight", (2, 4)),
        ("adapter", "query.lora_B.weight", (4, 2)),
        ("adapter", "block.value.lora_A.weight", (2, 4)),
        ("adapter", "block.value.lora_B.weight", (3, 2)),
    ]


@pytest.mark.parametrize("pattern", ["value", "block.*", "*.value", "v?lue"])
def test_targets_match_paths_or_their_last_part(pattern: str) -> None:
    layout = Lora({"rank": 2, "targets": [pattern]}).attach(Net(), 1).layout
    assert {t.name.partition(".lora")[0] for t in layout.tensors} == {"block.value"}


def test_targets_that_match_nothing_name_the_layers_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"adapter\.targets .*'valeu'.*query, block\.value"):
        Lora({"targets": ["valeu"]}).attach(Net(), 1)


def test_first_factor_is_uniform_within_kaiming_bound_and_second_is_zero() -> None:
    model = Lora({"rank": 64}).attach(nn.Sequential(nn.Linear(100, 64)), 5)
    factors = model.layout.unflatten(model.read())
    a = factors["adapter", "0.lora_A.weight"]
    assert not factors["adapter", "0.lora_B.weight"].any()
    assert np.abs(a).max() <= 0.1
    # A uniform variable in ±0.1 has standard deviation 0.1 / sqrt(3).
    assert a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.03)


def test_layers_and_seeds_draw_from_different_streams() -> None:
    def first_factors(seed: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        model = Lora({"rank": 4}).attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), seed)
        return [v for (_, name), v in model.layout.unflatten(model.read()).items() if "lora_A" in name]

    (one, other), (again, _) = first_factors(1), first_factors(2)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, again)


def test_output_is_base_plus_scaled_product_of_factors() -> None:
    base = nn.Linear(5, 3)
    model = Lora({"rank": 2, "alpha": 6.0}).attach(nn.Sequential(base), 1)
    flat_D = np.linspace(-1, 1, model.layout.num_values, dtype=np.float32)
    model.write(flat_D)
    factors = {name: torch.from_numpy(value) for (_, name), value in model.layout.unflatten(flat_D).items()}
    x = torch.linspace(-2, 2, 20).reshape(4, 5)
    merged = base.weight + 3.0 * factors["0.lora_B.weight"] @ factors["0.lora_A.weight"]
    torch.testing.assert_close(model.module(x), nn.functional.linear(x, merged, base.bias), rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = Lora({"rank": 2, "dropout": 0.5}).attach(nn.Sequential(nn.Linear(50, 3)), 1)
    model.write(np.ones(model.layout.num_values, dtype=np.float32))
    x = torch.ones(1, 50)
    model.module.eval()
    assert torch.equal(model.module(x), model.module(x))
    model.module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # masks come from torch's global generator
        assert not torch.equal(model.module(x), model.module(x))


def test_attention_that_reads_weights_directly_still_works() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Lora({}).attach(layer, 1)
    assert {t.name.partition(".lora")[0] for t in model.layout.tensors} == {"linear1", "linear2"}
    assert model.module(torch.ones(1, 3, 8)).shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 0}, r"adapter\.rank: .*greater than or equal to 1, got '0'"),
        ({"rank": "8"}, r"adapter\.rank: .*integer, got '8'"),
        ({"dropout": 1.0}, r"adapter\.dropout: .*less than 1"),
        ({"alhpa": 8}, r"adapter\.alhpa: unknown key; did you mean 'alpha'\? known: rank, dropout"),
    ],
)
def test_bad_parameter_names_key_value_and_bound(params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Lora(params)


def test_half_precision_model_keeps_its_type_and_travels_as_float32() -> None:
    model = Full({}).attach(nn.Linear(3, 2).to(torch.bfloat16), 1)
    assert {t.dtype for t in model.layout.tensors} == {"bfloat16"}
    model.write(np.full(model.layout.num_values, 1 / 3, dtype=np.float32))
    assert model.module.weight.dtype is torch.bfloat16
    np.testing.assert_allclose(model.read(), 1 / 3, rtol=2**-8)


def test_type_that_no_layout_knows_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"weight: torch\.float64 cannot be trained"):
        Full({}).attach(nn.Linear(3, 2).double(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_change_of_the_base_is_added_whatever_the_base_is_in(dtype: torch.dtype, transposed: bool) -> None:
    """In bfloat16 a change of a thousandth would be rounded away."""
    base = Conv1D(6, 5) if transposed else nn.Linear(5, 6)  # type: ignore[no-untyped-call]
    model = Lora({"rank": 2}).attach(nn.Sequential(base.to(dtype)), 1)
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((7, 5))).to(dtype)
    before = model.module(x).double().detach().numpy()
    changes = [(rng.standard_normal((6, r)), rng.standard_normal((r, 5))) for r in (3, 0, 1)]
    for b, a in changes:
        model.change_base(Change("0", (b * 1e-3).astype(np.float32), a.astype(np.float32)))
    summed = rng.standard_normal((6, 5)).astype(np.float32) * np.float32(1e-3)
    model.change_base(Change("0", summed, None))
    total = summed + sum((1e-3 * b @ a for b, a in changes), np.zeros((6, 5)))
    added = x.double().numpy() @ total.T
    after = model.module(x).double().detach().numpy()
    assert np.abs(after - before - added).max() < (1e-6 if dtype is torch.float32 else 2e-2)
    if dtype is torch.bfloat16:
        kept: Any = model.module[0]  # type: ignore[index]
        assert np.abs(kept.change_mn.double().numpy() - total).max() < 1e-6


def test_a_layer_that_keeps_its_matrix_says_so() -> None:
    model = Full({}).attach(nn.Sequential(nn.Linear(3, 2)), 1)
    with pytest.raises(InvalidInput, match="0: a Linear keeps its frozen matrix as it is"):
        model.change_base(Change("0", np.ones((2, 1), np.float32), np.ones((1, 3), np.float32)))
