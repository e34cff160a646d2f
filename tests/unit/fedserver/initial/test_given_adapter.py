"""What a job can start from, and that every value lands in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedcore.adapters import PEFT_PREFIX
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.layout import Layout, Vector
from fedserver.initial import folder as folders
from fedserver.initial.adapter import GivenValues, check_adapter
from fedserver.initial.folder import open_adapter
from fedserver.initial.tensors import TensorFile
from tests.support.adapters import SIDES, Tensors, config, factors, job_with, layout_of, write_adapter

A = PEFT_PREFIX + "first.lora_A.weight"
B = PEFT_PREFIX + "first.lora_B.weight"


def view(tensors: Tensors) -> memoryview:
    return memoryview(save(tensors))


def refusal(config_bytes: bytes | None = None, tensors: Tensors | None = None, job: Job | None = None) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        check_adapter(
            job or job_with(),
            config() if config_bytes is None else config_bytes,
            view(factors() if tensors is None else tensors),
        )
    return str(caught.value).splitlines()


@pytest.mark.parametrize("adapter", ["lora", "ffa-lora"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_alpha": 8},
        {"use_rslora": False, "rank_pattern": {}, "use_dora": None, "lora_bias": False, "layer_replication": None},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "modules_to_save": ["head"], "fan_in_fan_out": True},
        {"a_key_of_a_later_peft": None},
    ],
)
def test_an_adapter_of_the_jobs_rank_and_scale_is_taken(adapter: str, changes: dict[str, Any]) -> None:
    check_adapter(job_with(adapter), config(**changes), view(factors()))


@pytest.mark.parametrize(("adapter", "others"), [("full", {}), ("lora-sb", {"alpha": None}), ("someones", {})])
def test_other_adapters_cannot_start_so(adapter: str, others: dict[str, Any]) -> None:
    (line,) = refusal(job=job_with(adapter, **others))
    assert (
        line
        == f"adapter.name '{adapter}': a job cannot start from a PEFT adapter, but those of ffa-lora, lora, rolora can"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 4}, "r 4: the job's adapter.rank is 2"),
        ({"r": None}, "r null: the job's adapter.rank is 2"),
        ({"r": "2"}, 'r "2": the job'),
        ({"lora_alpha": 16}, "lora_alpha 16: the job's adapter.alpha is 8"),
        ({"lora_alpha": True}, "lora_alpha true: the job"),
        ({"use_rslora": True}, "use_rslora true: its scale is lora_alpha / sqrt(r), a job's is alpha / rank"),
        ({"use_dora": True}, "use_dora true: it has magnitudes besides A and B"),
        ({"bias": "all"}, 'bias "all": biases are trained too, in a job they are not'),
        ({"lora_bias": True}, "lora_bias true: the factors have biases, in a job they have none"),
        ({"rank_pattern": {"x": 4}}, 'rank_pattern {"x": 4}: layers differ in rank'),
        ({"alpha_pattern": {"x": 4}}, 'alpha_pattern {"x": 4}: layers differ in scale'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa": it has changed the base model'),
        ({"init_lora_weights": ["x"]}, 'init_lora_weights ["x"]: it has changed'),
        ({"layer_replication": [[0, 2]]}, "layer_replication [[0, 2]]: this changes what the adapter is"),
        ({"a_key_of_a_later_peft": 1}, "a_key_of_a_later_peft 1: this changes what the adapter is"),
        ({"odd\ud800key": 1}, "odd\\ud800key 1: this changes what the adapter is"),
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA'"),
    ],
)
def test_what_no_job_can_do_is_refused_by_its_key(changes: dict[str, Any], text: str) -> None:
    (line,) = refusal(config(**changes))
    assert line.startswith(f"adapter_config.json: {text}")


def test_every_wrong_key_has_a_line() -> None:
    assert len(refusal(config(r=4, lora_alpha=1, use_dora=True, bias="all"))) == 4


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b"[" * 5000, b"\xff", b'{"peft_type": "LORA"' + b" " * (1 << 20)]
)
def test_a_config_that_is_none_is_refused(data: bytes) -> None:
    (line,) = refusal(data)
    assert line.startswith("adapter_config.json: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "no key is that of a factor"),
        ({"first.lora_A.weight": np.ones((2, 5), "<f4")}, "does not begin with base_model.model."),
        ({A: np.ones((2, 5), "<f4")}, f"{A}: the layer's other factor is missing"),
        ({B: np.ones((6, 2), "<f4")}, f"{B}: the layer's other factor is missing"),
        ({A: np.ones((3, 5), "<f4"), B: np.ones((6, 2), "<f4")}, f"{A}: shape (3, 5), of rank 2 it is (r, n)"),
        ({A: np.ones((2, 5), "<f4"), B: np.ones((2, 6), "<f4")}, f"{B}: shape (2, 6), of rank 2 it is (m, r)"),
        ({A: np.ones((2, 5), "<f4"), B: np.ones((6, 2, 1), "<f4")}, f"{B}: shape (6, 2, 1)"),
        ({A: np.ones((2, 0), "<f4"), B: np.ones((6, 2), "<f4")}, f"{A}: shape (2, 0)"),
        ({PEFT_PREFIX + "e.lora_embedding_A": np.ones((2, 5), "<f4")}, "no factor of a linear layer"),
        ({A: np.ones((2, 5), "<i4"), B: np.ones((6, 2), "<f4")}, "type 'I32', known: F64"),
        ({A: np.full((2, 5), np.nan, "<f4"), B: np.ones((6, 2), "<f4")}, "value 0 is nan, not finite"),
    ],
)
def test_tensors_that_no_lora_of_this_rank_has_are_refused(change: Tensors, text: str) -> None:
    (line,) = refusal(tensors=change)
    assert line.startswith("adapter_model.safetensors: ")
    assert text in line


def test_of_many_wrong_tensors_some_are_named() -> None:
    many = factors({f"layer{i}": (6, 5) for i in range(20)}, rank=3)
    (line,) = refusal(tensors=many)
    assert line.endswith(" and 35 more")
    assert line.count("shape") == 5


# -- values ----------------------------------------------------------------------------------------------------------


@st.composite
def a_layout(draw: st.DrawFn) -> tuple[Layout, set[str]]:
    """Return a layout with tensors beside the factors, and the names of those that a file has too."""
    rank = draw(st.integers(1, 3))
    rows: list[tuple[str, str, tuple[int, ...], str]] = []
    has_basis = draw(st.booleans())
    sides = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    rows += [("adapter", f"{i}.lora_B.weight", (m, rank), "float32") for i, (m, _) in enumerate(sides)]
    others = [("model", f"head{i}", (draw(st.integers(1, 5)),), "float32") for i in range(draw(st.integers(0, 2)))]
    rows[len(rows) if has_basis else draw(st.integers(0, len(rows))) :] += others
    group = "basis" if has_basis else "adapter"
    rows += [(group, f"{i}.lora_A.weight", (rank, n), "float32") for i, (_, n) in enumerate(sides)]
    kept = {name for group, name, _, _ in rows if group != "model" or draw(st.booleans())}
    return Layout.of(rows), kept


def drawn(layout: Layout) -> Vector:
    return np.arange(1, layout.num_values + 1, dtype=np.float32)


@given(a_layout(), st.integers(1, 7))
def test_every_value_of_the_file_takes_its_place_whatever_the_pieces(
    layout_kept: tuple[Layout, set[str]], piece: int
) -> None:
    layout, kept = layout_kept
    tensors = layout.unflatten(drawn(layout))
    stored = {PEFT_PREFIX + name: value for (_, name), value in tensors.items() if name in kept}
    values = GivenValues(TensorFile(view(stored)), layout)
    found = -drawn(layout)
    for start in range(0, layout.num_values, piece):
        values.fill(found[start : start + piece], start)
    signs = np.concatenate([np.full(t.num_values, 1 if t.name in kept else -1) for t in layout.tensors])
    assert (found == signs * drawn(layout)).all()


@pytest.mark.parametrize(
    ("sides", "others", "text"),
    [
        ({"first": (6, 5)}, {}, "missing: block.second.lora_A.weight, block.second.lora_B.weight"),
        ({**SIDES, "third": (2, 2)}, {}, "not in the job's model: third.lora_A.weight, third.lora_B.weight"),
        (SIDES, {PEFT_PREFIX + "head.weight": np.ones(3, "<f4")}, "not in the job's model: head.weight"),
        ({**SIDES, "first": (6, 7)}, {}, r"of another shape: first.lora_A.weight (2, 7), in the job (2, 5)"),
    ],
)
def test_what_does_not_fit_the_jobs_tensors_is_listed(
    sides: dict[str, tuple[int, int]], others: Tensors, text: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        GivenValues(TensorFile(view(factors(sides) | others)), layout_of())
    assert str(caught.value) == text


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_opened_with_what_lies_in_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    with open_adapter(folder, job_with()) as found:
        assert found.weights.tobytes() == (folder / "adapter_model.safetensors").read_bytes()
        assert json.loads(found.given.config)["r"] == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adapter_config.json", "no PEFT adapter: adapter_config.json: No such file"),
        ("adapter_model.safetensors", "no PEFT adapter: adapter_model.safetensors: No such file"),
    ],
)
def test_a_folder_that_lacks_a_file_says_which(tmp_path: Path, name: str, text: str) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / name).unlink()
    with pytest.raises(InvalidInput, match=text), open_adapter(folder, job_with()):
        pass
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InvalidInput, match="can hold code and is not read"), open_adapter(folder, job_with()):
        pass


def test_an_empty_or_too_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "adapter")
    monkeypatch.setattr(folders, "MAX_ADAPTER_BYTES", 10)
    with pytest.raises(InvalidInput, match=r"bytes, expected 1 to 10"), open_adapter(folder, job_with()):
        pass
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"0 bytes, expected 1 to 10"), open_adapter(folder, job_with()):
        pass


def test_every_line_of_a_refusal_names_the_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", r=3, use_dora=True)
    with pytest.raises(InvalidInput) as caught, open_adapter(folder, job_with()):
        pass
    assert [line.startswith(f"{folder}: adapter_config.json: ") for line in str(caught.value).splitlines()] == [
        True
    ] * 2
