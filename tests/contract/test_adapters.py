"""What every adapter must do, whatever it trains, the one in examples/ included."""

from __future__ import annotations

import runpy
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedclient.adapters import ADAPTERS
from fedclient.adapters.base import AdaptedModel, Adapter
from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import Layout

SEED = 11
OWN_ADAPTER = Path(__file__).parents[2] / "examples" / "own_adapter" / "ia3.py"
TYPES: dict[str, type[Adapter]] = {
    **{name: ADAPTERS.get(name) for name in ADAPTERS.names()},
    "ia3": runpy.run_path(str(OWN_ADAPTER))["Ia3"],
}
# As they are, and with a norm that is trained whole beside or alone.
PARAMS: dict[str, dict[str, object]] = {
    **{name: {} for name in TYPES},
    **{f"{name} and weights": {"trainable": ["block.1.*"]} for name in ("full", "ffa-lora", "lora", "lora-sb")},
}


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return nn.Sequential(
            OrderedDict(
                first=nn.Linear(16, 12),
                block=nn.Sequential(nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 10)),
                last=nn.Linear(10, 8, bias=False),
            )
        )


def attach(name: str, seed: int = SEED) -> AdaptedModel:
    return TYPES[name.partition(" ")[0]](PARAMS[name]).attach(make_model(), seed)


@pytest.fixture(params=PARAMS)
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_same_seed_gives_the_same_layout_and_values(adapter: str) -> None:
    one, two = attach(adapter), attach(adapter)
    assert one.layout.digest == two.layout.digest
    assert one.read().tobytes() == two.read().tobytes()


def test_layout_does_not_depend_on_the_seed(adapter: str) -> None:
    assert attach(adapter, 1).layout == attach(adapter, 2).layout


def test_layout_survives_the_wire(adapter: str) -> None:
    layout = attach(adapter).layout
    assert Layout.from_json(layout.to_json()) == layout


def test_attaching_leaves_what_the_model_computes(adapter: str) -> None:
    inputs = torch.linspace(-1, 1, 32).reshape(2, 16)
    with torch.inference_mode():
        torch.testing.assert_close(attach(adapter).module(inputs), make_model()(inputs), rtol=0, atol=0)


def test_attaching_draws_nothing_from_the_global_generator(adapter: str) -> None:
    before = torch.get_rng_state()
    attach(adapter)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_written_is_read_back(adapter: str) -> None:
    model = attach(adapter)
    flat_D = np.linspace(-1, 1, model.layout.moving.num_values, dtype=np.float32)
    model.write(flat_D)
    assert model.read().tobytes() == flat_D.tobytes()


def test_a_basis_is_read_back_behind_what_is_trained(adapter: str) -> None:
    model = attach(adapter)
    num_moving = model.layout.moving.num_values
    flat_D = np.linspace(-1, 1, model.layout.num_values, dtype=np.float32)
    model.write(flat_D[:num_moving])
    model.write_basis(flat_D[num_moving:])
    assert model.read_all().tobytes() == flat_D.tobytes()
    with pytest.raises(LayoutError, match=str(model.layout.num_basis_values)):
        model.write_basis(np.zeros(model.layout.num_basis_values + 1, dtype=np.float32))


def test_moving_the_model_keeps_its_values_at_hand(adapter: str) -> None:
    model = attach(adapter)
    model.module.double()  # as a move to another device: what is not a parameter becomes another object
    held = {id(value) for value in model.module.parameters()}
    assert {id(value) for value in (*model.parameters, *model.basis.values())} <= held


def test_reading_copies(adapter: str) -> None:
    model = attach(adapter)
    before = model.read()
    kept = before.copy()
    model.write(before + np.float32(1))
    np.testing.assert_array_equal(before, kept)


def test_writing_another_length_is_refused(adapter: str) -> None:
    model = attach(adapter)
    with pytest.raises(LayoutError, match=str(model.layout.moving.num_values)):
        model.write(np.zeros(model.layout.moving.num_values + 1, dtype=np.float32))


def test_training_changes_the_vector_and_nothing_else(adapter: str) -> None:
    model = attach(adapter)
    model.write_basis(np.linspace(-1, 1, model.layout.num_basis_values, dtype=np.float32))
    trained = {id(parameter) for parameter in model.parameters}
    frozen = [(p, p.detach().clone()) for p in model.module.parameters() if id(p) not in trained]
    basis = model.read_basis()
    before = model.read()
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    model.module(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()
    assert not np.array_equal(model.read(), before)
    np.testing.assert_array_equal(model.read_basis(), basis)
    assert all(torch.equal(parameter, value) for parameter, value in frozen)


def test_unknown_parameter_names_its_key_path(adapter: str) -> None:
    with pytest.raises(InvalidInput, match=r"adapter\.rnak: unknown key"):
        TYPES[adapter.partition(" ")[0]]({"rnak": 4})
