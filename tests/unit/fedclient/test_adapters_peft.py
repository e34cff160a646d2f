"""An exported LoRA adapter is read by the real peft package and computes the same."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedclient.adapters.lora import Lora
from fedclient.tasks.digits.network import load_base
from fedcore.adapters import lora_modules
from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import Layout
from tests.support.exports import export


@pytest.mark.parametrize(
    "params",
    [
        {"rank": 10, "alpha": 128},
        {},
        {"rank": 3, "alpha": 7.5, "dropout": 0.2, "targets": ["hidden*"]},
    ],
)
def test_peft_loads_the_export_and_gives_the_same_logits(params: dict[str, object], tmp_path: Path) -> None:
    model = Lora(params).attach(load_base(), 1)
    values = np.random.default_rng(0).normal(0, 0.05, model.layout.num_values)
    model.write(values.astype(np.float32))
    exported = export(model, {"name": "lora", **params}, tmp_path / "out")
    loaded = PeftModel.from_pretrained(load_base(), exported.folder)
    inputs = torch.from_numpy(np.random.default_rng(1).random((32, 64), dtype=np.float32))
    model.module.eval()
    with torch.inference_mode():
        ours, theirs, base = model.module(inputs), loaded(inputs), load_base()(inputs)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(base, ours, atol=1e-2)


def test_modules_and_ranks_are_read_from_the_layout() -> None:
    assert lora_modules(Lora({"rank": 4}).attach(load_base(), 1).layout) == {"hidden1": 4, "hidden2": 4, "output": 4}


def test_layout_of_another_rank_than_the_jobs_is_refused(tmp_path: Path) -> None:
    model = Lora({"rank": 4}).attach(load_base(), 1)
    with pytest.raises(LayoutError, match="hidden1 has rank 4, the job says 8"):
        export(model, {"name": "lora", "rank": 8}, tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"adapter\.rank"):
        export(model, {"name": "lora", "rank": 0}, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w.weight", (2, 2))], "w.weight is not a LoRA factor"),
        ([("w.lora_A.weight", (2, 5))], "the other LoRA factor of w is missing"),
        ([("w.lora_A.weight", (2, 5)), ("w.lora_B.weight", (5, 3))], "(2, 5) and (5, 3) are not (rank, in)"),
        ([("w.lora_A.weight", (2,)), ("w.lora_B.weight", (5, 2))], "are not (rank, in)"),
    ],
)
def test_layout_that_is_no_lora_adapter_is_refused(tensors: list[tuple[str, tuple[int, ...]]], message: str) -> None:
    layout = Layout.of(("adapter", name, shape, "float32") for name, shape in tensors)
    with pytest.raises(LayoutError, match=re.escape(message)):
        lora_modules(layout)
