"""An export as a whole, without torch's part in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from fedcore.errors import LayoutError, StateUnusable
from fedcore.layout import Layout
from fedserver.export import export, export_version
from tests.support.exports import FULL, LORA, make_exportable, make_job


def test_full_weights_are_one_file_with_a_card_and_a_plot(tmp_path: Path) -> None:
    what, state = make_exportable(FULL)
    exported = export_version(what, state, tmp_path / "out")
    folder = tmp_path / "out"
    assert exported.files == tuple(folder / name for name in ("README.md", "model.safetensors", "rounds.png"))
    assert sorted(folder.iterdir()) == list(exported.files)
    assert exported.weights == folder / "model.safetensors"
    assert exported.model_card == folder / "README.md"
    assert exported.plot == folder / "rounds.png"
    assert exported.adapter is None
    with safe_open(exported.weights, "pt") as file:
        assert set(file.keys()) == {"hidden.weight", "hidden.bias"}
        assert file.metadata() == {
            "format": "pt",
            "federation": "north",
            "job_id": "digits-0001",
            "job_name": "digits",
            "version": "2",
            "state_sha256": what.state_sha256,
        }


@pytest.mark.parametrize("key", ["base_model", "model"])
def test_lora_becomes_a_peft_adapter_folder(key: str, tmp_path: Path) -> None:
    job = make_job(task={"name": "text", key: "org/base"})
    what, state = make_exportable(LORA, job=job)
    exported = export_version(what, memoryview(state), tmp_path / "out")
    assert exported.adapter == exported.folder == tmp_path / "out"
    assert exported.weights == exported.adapter / "adapter_model.safetensors"
    config = json.loads((exported.adapter / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "org/base"
    with safe_open(exported.weights, "pt") as file:
        assert set(file.keys()) == {f"base_model.model.hidden.lora_{factor}.weight" for factor in "AB"}


def test_same_version_gives_the_same_bytes(tmp_path: Path) -> None:
    what, state = make_exportable(LORA)
    one, two = (export_version(what, state, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in one.files] == [path.read_bytes() for path in two.files]


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "plotting_installed", lambda: False)
    what, state = make_exportable(LORA)
    exported = export_version(what, state, tmp_path / "out")
    assert exported.plot is None
    assert "rounds.png" not in {path.name for path in exported.folder.iterdir()}
    assert "rounds.png" not in exported.model_card.read_text()


def test_damaged_state_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    what, state = make_exportable(LORA)
    for wrong, message in (
        (state[:-4], "the state has 52 bytes, its layout 56"),
        (b"\x01" + state[1:], f"recorded is {what.state_sha256}"),
    ):
        with pytest.raises(StateUnusable, match=f"version 2 of job digits-0001: .*{message}"):
            export_version(what, wrong, tmp_path / "out")
    with pytest.raises(StateUnusable, match="the history says"):
        export_version(replace(what, version=1), state, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_used_in_two_groups_are_told_apart(tmp_path: Path) -> None:
    layout = Layout.of([("body", "weight", (2,), "float32"), ("head", "weight", (2,), "float32")])
    what, state = make_exportable(layout)
    with safe_open(export_version(what, state, tmp_path / "out").weights, "pt") as file:
        assert set(file.keys()) == {"body/weight", "head/weight"}


def test_lora_layout_with_a_name_in_two_groups_is_refused(tmp_path: Path) -> None:
    rows = [(group, t.name, t.shape, t.dtype) for group in ("adapter", "other") for t in LORA.tensors]
    what, state = make_exportable(Layout.of(rows), job=make_job())
    with pytest.raises(LayoutError, match="once"):
        export_version(what, state, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
