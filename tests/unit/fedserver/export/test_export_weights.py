"""The safetensors file, read by the real package."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import DTYPES, Layout
from fedserver.export.weights import safetensors_chunks

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def written(layout: Layout, values_D: np.ndarray, keys: list[str] | None = None) -> bytes:
    state = values_D.astype("<f4").tobytes()
    names = keys or [tensor.name for tensor in layout.tensors]
    return b"".join(bytes(chunk) for chunk in safetensors_chunks(names, layout, state, {"version": "3"}))


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3).map(tuple)), min_size=1, max_size=6
    )
)
def test_every_tensor_comes_back_with_its_shape_dtype_and_rounded_values(
    rows: list[tuple[str, tuple[int, ...]]],
) -> None:
    layout = Layout.of(("model", f"part.{i}", shape, dtype) for i, (dtype, shape) in enumerate(rows))
    values_D = np.random.default_rng(5).normal(0, 3, layout.num_values).astype(np.float32)
    read = load(written(layout, values_D))
    assert set(read) == {tensor.name for tensor in layout.tensors}
    for (_, name), value in layout.unflatten(values_D).items():
        dtype = next(TORCH[tensor.dtype] for tensor in layout.tensors if tensor.name == name)
        assert torch.equal(read[name], torch.from_numpy(value.copy()).to(dtype))


def test_tensors_larger_than_a_chunk_come_back_whole() -> None:
    layout = Layout.of([("model", "w", (1025, 2049), "bfloat16"), ("model", "b", (3,), "float32")])
    values_D = np.arange(layout.num_values, dtype=np.float32)
    read = load(written(layout, values_D))
    assert torch.equal(read["w"].reshape(-1), torch.from_numpy(values_D[:-3]).bfloat16())
    assert read["b"].tolist() == values_D[-3:].tolist()


def test_every_tensor_begins_at_a_multiple_of_its_item_size() -> None:
    layout = Layout.of([("model", "half", (3,), "float16"), ("model", "whole", (2,), "float32")])
    data = written(layout, np.ones(5))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["whole"]["data_offsets"] == [0, 8]
    assert header["half"]["data_offsets"] == [8, 14]
    assert header["__metadata__"] == {"version": "3"}


@pytest.mark.parametrize("name", ["naïve.Schicht\u2126", 'quote"back\\slash', "\U0001f600"])
def test_any_printable_name_is_a_key(name: str) -> None:
    assert set(load(written(Layout.of([("model", name, (1,), "float32")]), np.ones(1)))) == {name}


def test_reserved_name_is_refused() -> None:
    with pytest.raises(LayoutError, match="__metadata__"):
        written(Layout.of([("model", "__metadata__", (1,), "float32")]), np.ones(1))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_value_beyond_the_dtype_is_refused_with_the_tensor_named(dtype: str, value: float) -> None:
    layout = Layout.of([("model", "w", (2,), dtype)])
    with pytest.raises(InvalidInput, match=f"tensor w: value .* does not fit its dtype {dtype}"):
        written(layout, np.array([1.0, value], dtype=np.float32))
