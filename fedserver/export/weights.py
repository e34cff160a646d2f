"""The safetensors file, written piece by piece.

The safetensors package would need the converted tensors in memory at once, has no bfloat16 for numpy, and hides the
operating system's errors. The format is short (https://github.com/huggingface/safetensors, "Format"): the header's
length (u64, little-endian), the header (JSON: name -> dtype, shape, byte range), the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from fedcodec.quantisers.floats import round_to_bf16
from fedcore.errors import InvalidInput, LayoutError
from fedcore.layout import Layout, Vector

METADATA_KEY: Final = "__metadata__"
"""A key of the header that is no tensor."""
CODES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The format's words for the dtypes of a layout."""
ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
CHUNK_VALUES: Final = 1 << 20


class Entry(NamedTuple):
    """A tensor of a file: `chunks` gives its `num_bytes`, row by row."""

    key: str
    code: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Callable[[], Iterator[bytes | memoryview]]


def safetensors_chunks(
    keys: Sequence[str], layout: Layout, state: bytes | bytearray | memoryview, metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file with all tensors of a layout; see `safetensors_file`.

    Args:
        keys: the name in the file of each tensor of `layout`, all different.
        layout: where each tensor lies in `state`, and the dtype that it is written in.
        state: raw little-endian float32, as long as the layout says.
        metadata: kept in the header.
    """
    values = layout.unflatten(np.frombuffer(state, dtype="<f4")).values()
    entries = [
        entry_of(key, tensor.dtype, value) for key, tensor, value in zip(keys, layout.tensors, values, strict=True)
    ]
    return safetensors_file(entries, metadata)


def safetensors_file(entries: Iterable[Entry], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file; the same arguments give the same bytes.

    Args:
        entries: its tensors, with keys that are all different.
        metadata: kept in the header.

    Raises:
        LayoutError: a key that the format reserves.
        InvalidInput: while it is being read: a value that is finite, but not in the tensor's dtype.
    """
    # Wide types first, so that every tensor begins at a multiple of its item size.
    placed = sorted(entries, key=lambda entry: -(entry.num_bytes // max(1, math.prod(entry.shape))))
    if any(entry.key == METADATA_KEY for entry in placed):
        raise LayoutError(f"tensor {METADATA_KEY}: safetensors reserves this name")
    return _chunks(placed, dict(metadata))


def entry_of(key: str, dtype: str, values: Vector) -> Entry:
    """Return `values` as a tensor of a file in a layout's `dtype`."""
    flat = values.reshape(-1)

    def chunks() -> Iterator[bytes | memoryview]:
        for start in range(0, flat.size, CHUNK_VALUES):
            yield converted(flat[start : start + CHUNK_VALUES], dtype, key)

    return Entry(key, CODES[dtype], values.shape, flat.size * ITEM_BYTES[dtype], chunks)


def _chunks(placed: Sequence[Entry], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {METADATA_KEY: metadata}
    end = 0
    for entry in placed:
        begin, end = end, end + entry.num_bytes
        header[entry.key] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in placed:
        yield from entry.chunks()


def converted(values: Vector, dtype: str, key: str) -> memoryview:
    """Return float32 `values` in `dtype`, rounded to nearest with ties to even, as torch does it.

    Raises:
        InvalidInput: a finite value has no finite neighbour in `dtype`; the text names the tensor, `key`.
    """
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype="<f4").data.cast("B")
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
