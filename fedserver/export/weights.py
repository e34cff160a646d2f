"""The safetensors file, written piece by piece.

The safetensors package would need the converted tensors in memory at once, has no bfloat16 for numpy, and hides the
operating system's errors. The format is short (https://github.com/huggingface/safetensors, "Format"): the header's
length (u64, little-endian), the header (JSON: name -> dtype, shape, byte range), the data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from fedcodec.quantisers.floats import round_to_bf16
from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import Layout, TensorSpec, Vector

_METADATA_KEY: Final = "__metadata__"
_DTYPES: Final = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_CHUNK_VALUES: Final = 1 << 20


def safetensors_chunks(
    keys: Sequence[str], layout: Layout, state: bytes | bytearray | memoryview, metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; the same arguments give the same bytes.

    Args:
        keys: the name in the file of each tensor of `layout`, all different.
        layout: where each tensor lies in `state`, and the dtype that it is written in.
        state: raw little-endian float32, as long as the layout says.
        metadata: kept in the header.

    Raises:
        LayoutError: a key that the format reserves.
        InvalidInput: while it is being read: a value that is finite in `state` but not in the tensor's dtype.
    """
    if _METADATA_KEY in keys:
        raise LayoutError(f"tensor {_METADATA_KEY}: safetensors reserves this name")
    values_D = np.frombuffer(state, dtype="<f4")
    # Wide types first, so that every tensor begins at a multiple of its item size.
    placed = sorted(zip(keys, layout.tensors, strict=True), key=lambda pair: -_DTYPES[pair[1].dtype][1])
    return _chunks(placed, values_D, dict(metadata))


def _chunks(
    placed: Sequence[tuple[str, TensorSpec]], values_D: Vector, metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {_METADATA_KEY: metadata}
    end = 0
    for key, tensor in placed:
        code, item_bytes = _DTYPES[tensor.dtype]
        begin, end = end, end + tensor.num_values * item_bytes
        header[key] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key, tensor in placed:
        stop = tensor.offset + tensor.num_values
        for start in range(tensor.offset, stop, _CHUNK_VALUES):
            yield _converted(values_D[start : min(start + _CHUNK_VALUES, stop)], tensor.dtype, key)


def _converted(values: Vector, dtype: str, key: str) -> memoryview:
    """Return `values` in `dtype`, rounded to nearest with ties to even, as torch does it."""
    if dtype == "float32":
        return values.data.cast("B")
    if dtype == "bfloat16":
        halves = round_to_bf16(values)
        overflow = (halves & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            rounded = values.astype("<f2")
        halves, overflow = rounded.view("<u2"), np.isinf(rounded)
    lost = overflow & np.isfinite(values)
    if lost.any():
        raise InvalidInput(f"tensor {key}: value {float(values[lost][0]):g} does not fit its dtype {dtype}")
    return halves.data.cast("B")
