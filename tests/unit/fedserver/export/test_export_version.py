"""An export as a whole, without torch's part in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fedcore.errors import InvalidInput, LayoutError, StateUnusable
from fedcore.layout import Layout
from fedserver.export import Exportable, export, export_version
from tests.support.exports import FULL, LORA, make_exportable, make_history, make_job, make_state


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


SB = Layout.of(
    [
        ("adapter", "hidden.lora_R.weight", (2, 2), "float32"),
        ("basis", "hidden.lora_A.weight", (2, 3), "float32"),
        ("basis", "hidden.lora_B.weight", (4, 2), "float32"),
    ]
)


def fed_sb_version() -> tuple[Exportable, bytes]:
    trained, basis = make_state(SB.moving), np.linspace(2, 3, SB.num_basis_values, dtype="<f4").tobytes()
    what, _ = make_exportable(SB, job=make_job(adapter={"name": "lora-sb", "rank": 2, "samples": 5}))
    digest = hashlib.sha256(trained).hexdigest()
    history = make_history(trained, 2)
    return (
        replace(what, state_sha256=digest, basis_sha256=hashlib.sha256(basis).hexdigest(), history=history),
        trained + basis,
    )


def test_three_factors_become_two_with_scale_one(tmp_path: Path) -> None:
    what, state = fed_sb_version()
    exported = export_version(what, memoryview(state), tmp_path / "out")
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2.0)
    values = {name: value.astype(np.float64) for (_, name), value in SB.unflatten(np.frombuffer(state, "<f4")).items()}
    with safe_open(exported.weights, "np") as file:
        assert sorted(file.keys()) == [f"base_model.model.hidden.lora_{factor}.weight" for factor in "AB"]
        a_rn, b_mr = (file.get_tensor(f"base_model.model.hidden.lora_{factor}.weight") for factor in "AB")
        assert file.metadata()["state_sha256"] == what.state_sha256
    assert np.array_equal(a_rn, values["hidden.lora_A.weight"])
    product = values["hidden.lora_B.weight"] @ values["hidden.lora_R.weight"]
    assert np.abs(b_mr - product).max() < 1e-6
    assert "4 in 1 tensors" in exported.model_card.read_text()


def test_a_basis_that_is_not_the_recorded_one_is_refused(tmp_path: Path) -> None:
    what, state = fed_sb_version()
    with pytest.raises(StateUnusable, match="the basis's SHA-256 is"):
        export_version(what, state[:-1] + b"?", tmp_path / "out")
    with pytest.raises(StateUnusable, match="the state's SHA-256 is"):
        export_version(what, b"?" + state[1:], tmp_path / "out")
    with pytest.raises(StateUnusable, match="the state has 16 bytes, its layout 72"):
        export_version(what, state[:16], tmp_path / "out")


def test_a_version_before_the_start_has_nothing_to_export(tmp_path: Path) -> None:
    what, state = fed_sb_version()
    with pytest.raises(InvalidInput, match="is the base model: the job starts from gradients"):
        export_version(replace(what, version=0, basis_sha256=None), state[:16], tmp_path / "out")


def test_what_is_trained_beside_the_factors_is_not_lost_in_silence(tmp_path: Path) -> None:
    rows = [(t.group, t.name, t.shape, t.dtype) for t in SB.tensors]
    layout = Layout.of([("head", "head.weight", (2,), "float32"), *rows])
    what, _ = fed_sb_version()
    trained, basis = make_state(layout.moving), make_state(SB)[: 4 * SB.num_basis_values]
    digests = [hashlib.sha256(part).hexdigest() for part in (trained, basis)]
    what = replace(
        what, layout=layout, state_sha256=digests[0], basis_sha256=digests[1], history=make_history(trained, 2)
    )
    with pytest.raises(LayoutError, match=r"head\.weight is trained beside the factors"):
        export_version(what, trained + basis, tmp_path / "out")
