from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedclient.adapters import ADAPTERS
from fedclient.basedigest import base_digest, frozen_digest, weights_of
from fedclient.tasks.digits.network import BASE_WEIGHTS, load_base
from fedclient.tasks.digits.task import Digits
from fedclient.trainer import LocalWorker, Work
from fedcore.errors import InvalidInput
from fedcore.jobfile import parse_job


def small() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_digest_is_what_the_definition_says() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    tensor = hashlib.sha256(b'["F32", [1, 2]]\n' + bytes.fromhex("0000803f000000c0")).hexdigest()
    assert base_digest(model) == hashlib.sha256(json.dumps([["weight", tensor]]).encode()).hexdigest()


def test_file_and_model_agree_however_many_files_there_are(tmp_path: Path) -> None:
    tensors = load_base().state_dict()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in names[2:]}, tmp_path / "0.safetensors")
    assert base_digest(tmp_path) == base_digest(BASE_WEIGHTS) == base_digest(load_base())


@pytest.mark.parametrize("bit", [0, 1000, -1])
def test_one_bit_makes_another_digest(bit: int, tmp_path: Path) -> None:
    model = load_base()
    before = base_digest(model)
    flat = model.get_parameter("hidden1.weight").data.view(-1).view(torch.uint8)
    flat[bit] ^= 1
    assert base_digest(model) != before
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    assert base_digest(tmp_path) == base_digest(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {"c": tensors["a"], "b": tensors["b"]},
        lambda tensors: {**tensors, "a": tensors["a"].reshape(3, 2)},
        lambda tensors: {**tensors, "b": tensors["b"].view(torch.float16)},
        lambda tensors: {**tensors, "c": torch.empty(0)},
    ],
    ids=["name", "shape", "dtype", "empty tensor"],
)
def test_names_shapes_and_types_count_too(change: object, tmp_path: Path) -> None:
    assert callable(change)
    save_file(small(), tmp_path / "one.safetensors")
    save_file(change(small()), tmp_path / "other.safetensors")
    assert base_digest(tmp_path / "one.safetensors") != base_digest(tmp_path / "other.safetensors")


def test_tensor_larger_than_a_piece_and_one_that_lies_across_memory(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.arange(6_000_000, dtype=torch.float32).reshape(3000, 2000).T)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "x.safetensors")
    assert base_digest(tmp_path) == base_digest(model)


def test_changed_file_is_hashed_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(small(), file)
    before = base_digest(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    stat = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert base_digest(file) == before, "size and time are those of the file that was hashed"
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert base_digest(file) != before


def test_tied_weight_counts_once() -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 3, bias=False), "two": nn.Linear(3, 3, bias=False)})
    untied = base_digest(model)
    model["two"].weight = model["one"].weight
    assert base_digest(model) == base_digest(nn.ModuleDict({"one": model["one"]})) != untied


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999]}}',
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-40,-36]}}',
    ],
)
def test_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"x\.safetensors: cannot be read as safetensors"):
        base_digest(tmp_path)


def test_folder_without_weights_and_tensor_in_two_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no \*\.safetensors"):
        base_digest(tmp_path)
    for name in ("x", "y"):
        save_file(small(), tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidInput, match=r"y\.safetensors: tensor a is in another file"):
        base_digest(tmp_path)


# -- what is frozen of a job's model ---------------------------------------------------------------------------------


def worker_and_work(**adapter: object) -> tuple[LocalWorker, Work]:
    tree = {"job": {"name": "j", "rounds": 1}, "task": {"name": "digits"}, "schedule": {"cohort": 1}}
    job = parse_job(tree | {"adapter": adapter}, "job")
    return LocalWorker({"shard": "0", "num_shards": "5"}, "cpu"), Work("job", job, 0, "ann", 1)


@pytest.mark.parametrize("adapter", ["lora", "ffa-lora", "lora-sb"])
def test_of_an_adapter_it_is_the_bases_own_before_and_after_training(adapter: str) -> None:
    worker, work = worker_and_work(name=adapter, rank=2)
    assert worker.base_digest(work) == base_digest(BASE_WEIGHTS)
    layout, values_D = worker.initialise(work)
    worker.train(work, values_D[: layout.moving.num_values] + np.float32(0.1))
    assert worker.base_digest(work) == base_digest(BASE_WEIGHTS)


def test_where_every_weight_is_trained_there_is_none() -> None:
    worker, work = worker_and_work(name="full")
    assert worker.base_digest(work) is None


def test_it_is_that_of_the_model_that_was_built_last(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, work = worker_and_work(name="lora", rank=2)
    before = worker.base_digest(work)

    def flipped(task: Digits) -> nn.Module:
        model = load_base()
        model.get_parameter("hidden1.weight").data.view(-1).view(torch.uint8)[7] ^= 4
        return model

    monkeypatch.setattr(Digits, "build_model", flipped)
    assert worker.base_digest(work) == before, "nothing was built"
    worker.initialise(work)
    assert worker.base_digest(work) != before
    worker.forget("job")
    monkeypatch.undo()
    assert worker.base_digest(work) == before


class Odd(nn.Module):
    """Layers in half precision and in integers, a buffer, a tied weight, and something saved that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rough = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.packed = nn.Parameter(torch.arange(5, dtype=torch.uint8), requires_grad=False)
        self.head = nn.Linear(2, 2)
        self.tied = self.head
        self.register_buffer("mean", torch.zeros(2))
        for parameter in (*self.rough.parameters(), *self.head.parameters()):
            nn.init.constant_(parameter, 0.5)

    def get_extra_state(self) -> Any:
        return {"format": 1}


def flip(tensor: torch.Tensor) -> None:
    tensor.data.view(-1).view(torch.uint8)[0] ^= 1


def test_a_bit_of_what_is_frozen_counts_and_of_what_is_trained_does_not() -> None:
    def digest(change: str = "") -> str | None:
        model = Odd()
        if change:
            flip(dict(weights_of(model))[change])
        return frozen_digest(weights_of(model), model.head.parameters())

    frozen = ["rough.weight", "rough.bias", "packed", "mean"]
    assert len({digest(), *(digest(name) for name in frozen)}) == 1 + len(frozen)
    assert digest("head.weight") == digest("tied.bias") == digest()


def test_buffers_alone_make_no_base_and_nothing_is_copied() -> None:
    model = Odd()
    weights = weights_of(model)
    assert frozen_digest(weights, model.parameters()) is None
    assert {id(value) for value in weights.values()} == {id(value) for value in (*model.parameters(), model.mean)}


def test_an_adapters_own_factors_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weights = weights_of(model)
    before = frozen_digest(weights, [])
    adapted = ADAPTERS.get("ffa-lora")({"rank": 2, "targets": ["0"]}).attach(model, 1)
    assert frozen_digest(weights, [*adapted.parameters, *adapted.basis.values()]) == before


def test_quantised_weights_count_as_they_lie_packed_values_and_scales() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised() -> dict[str, torch.Tensor]:
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        layer.load_state_dict({"weight": values, "bias": torch.zeros(64)})
        return weights_of(layer.to("cpu"))  # moving it packs it

    weights = quantised()
    assert weights["weight"].dtype is torch.uint8
    assert frozen_digest(weights, []) == frozen_digest(quantised(), [])
    for name in ("weight", "weight.absmax"):
        changed = quantised()
        flip(changed[name])
        assert frozen_digest(changed, []) != frozen_digest(weights, []), name
