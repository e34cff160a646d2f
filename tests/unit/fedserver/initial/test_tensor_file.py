"""The reader against the safetensors package, and against files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fedcore.errors import InvalidInput
from fedserver.initial import tensors
from fedserver.initial.tensors import TensorFile

SPECIAL = [0.0, -0.0, 1e-45, -3.3e38, 65504.0, 2.0**-24, 1 / 3]


def written(header: Any, data: bytes = b"", *, length: int | None = None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def row(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_value_is_what_torch_makes_a_float32_of(dtype: torch.dtype, tmp_path: Path) -> None:
    drawn = torch.randn(11, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    kept = {"a.b": drawn.to(dtype), "odd": torch.tensor([1.0], dtype=dtype), "none": torch.empty(0, 3, dtype=dtype)}
    if dtype is not torch.float16:
        kept["special"] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    file = TensorFile(memoryview(path.read_bytes()))
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in kept.items()
    }
    for name, tensor in kept.items():
        flat = tensor.to(torch.float32).flatten().numpy()
        assert file.values(name, 0, flat.size).tobytes() == flat.tobytes()
        for start in range(0, flat.size, 5):
            assert file.values(name, start, min(start + 5, flat.size)).tobytes() == flat[start : start + 5].tobytes()
    file.check_finite()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (memoryview(b""), "a header of -1 bytes in 0"),
        (memoryview(b"\x00" * 8), "a header of 0 bytes in 8"),
        (written({}, length=3), "a header of 3 bytes in 10, at most 2"),
        (written({}, length=2**63), "at most 2"),
        (written(b"{]"), "not JSON"),
        (written(b"[" * 5000), "not JSON"),
        (written([]), "is no object"),
        (written({"a": 5}), "tensor a: 5 is no row"),
        (written({"a": {"dtype": "F32", "shape": [2]}}), "no row"),
        (written({"a": row(shape=[2.0])}, bytes(8)), "no row"),
        (written({"a": row(shape=[True])}, bytes(8)), "no row"),
        (written({"a": row(offsets=[0, 4, 8])}, bytes(8)), "no row"),
        (written({"a": row("I64", (1,))}, bytes(8)), "type 'I64', known: F64, F32, F16, BF16"),
        (written({"a": row("F8_E4M3", (8,))}, bytes(8)), "type 'F8_E4M3'"),
        (written({"a": row(shape=(2, -1, -1))}, bytes(8)), "shape .2, -1, -1."),
        (written({"a": row(shape=(1,) * 9)}, bytes(8)), "at most 8 sizes"),
        (written({"a": row(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)), "shape"),
        (written({"a": row(shape=(2**36, 2**36), offsets=(0, 8))}, bytes(8)), "bytes 0 to 8 of 8, its type and shape"),
        (written({"a": row()}, bytes(7)), "bytes 0 to 8 of 7"),
        (written({"a": row(offsets=(4, 8))}, bytes(8)), "bytes 4 to 8 of 8, its type and shape take 8"),
        (written({"a": row(offsets=(-8, 0))}, bytes(8)), "bytes -8 to 0"),
        (written({"a": row(), "b": row()}, bytes(8)), "tensor b: begins at byte 0, expected 8"),
        (written({"a": row(offsets=(4, 12))}, bytes(12)), "tensor a: begins at byte 4, expected 0"),
        (written({"a": row()}, bytes(9)), "1 bytes follow the last tensor"),
        (written({"a\n": row()}, bytes(8)), "printable"),
        (written({"": row()}, bytes(8)), "printable"),
        (written({"a" * 513: row()}, bytes(8)), "1 to 512"),
    ],
)
def test_what_is_no_such_file_is_refused(data: memoryview, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        TensorFile(data)


def test_a_header_is_not_read_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_HEADER_BYTES", 20)
    with pytest.raises(InvalidInput, match="a header of 21 bytes in 129, at most 20"):
        TensorFile(written(b" " * 19 + b"{}", bytes(100)))
    TensorFile(written(b" " * 18 + b"{}"))


def test_there_is_a_bound_on_how_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_TENSORS", 1)
    rows = {"a": row(), "b": row()}
    with pytest.raises(InvalidInput, match="2 tensors, at most 1"):
        TensorFile(written(rows, bytes(8)))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("index", [0, 3, 4, 9])
def test_a_value_that_is_not_finite_is_named(
    dtype: str, value: float, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHECKED_VALUES", 4)
    with np.errstate(over="ignore"):
        values = np.ones(10).astype({"F32": "<f4", "F64": "<f8"}[dtype])
        values[index] = value
    rows = {"a": row(dtype, (2, 5), (0, values.nbytes))}
    with pytest.raises(InvalidInput, match=f"tensor a: value {index} is (nan|-?inf), not finite"):
        TensorFile(written(rows, values.tobytes())).check_finite()
