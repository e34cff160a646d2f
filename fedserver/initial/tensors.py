"""Reads a safetensors file of floating-point tensors piece by piece; every length is checked before it is used.

The safetensors package would read all of it at once, and has no bfloat16 for numpy. The format
(https://github.com/huggingface/safetensors, "Format"): the header's length (u64, little-endian), the header (JSON:
name -> dtype, shape, byte range), the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from fedcore.errors import InvalidInput
from fedcore.layout import MAX_DIMENSIONS, MAX_TENSOR_NAME, MAX_TENSORS, MAX_VALUES, Vector

MAX_HEADER_BYTES: Final = 16 << 20
"""More than the tensors of any layout that travels in an update's header take here."""
CHECKED_VALUES: Final = 1 << 20

_LENGTH_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_DTYPES: Final = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


class StoredTensor(NamedTuple):
    """A tensor's type, as safetensors calls it, its shape, and where its first value lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def num_values(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes they take."""
        return self.num_values * _DTYPES[self.dtype][1]


class TensorFile:
    """The tensors of a safetensors file.

    Args:
        data: the whole file, as a mapped one is.

    Attributes:
        tensors: by name, in the order of the header.

    Raises:
        InvalidInput: it is no such file, is cut short, or holds a tensor that is not of floating-point numbers.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        num_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little") if len(data) >= _LENGTH_BYTES else -1
        limit = min(MAX_HEADER_BYTES, len(data) - _LENGTH_BYTES)
        if not 0 < num_bytes <= limit:
            raise InvalidInput(f"not a safetensors file: a header of {num_bytes} bytes in {len(data)}, at most {limit}")
        first = _LENGTH_BYTES + num_bytes
        try:
            header = json.loads(bytes(data[_LENGTH_BYTES:first]))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"not a safetensors file: its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise InvalidInput("not a safetensors file: its header is no object")
        header.pop(_METADATA, None)
        if len(header) > MAX_TENSORS:
            raise InvalidInput(f"{len(header)} tensors, at most {MAX_TENSORS}")
        self.tensors: Mapping[str, StoredTensor] = {
            name: _stored(name, row, first, len(data)) for name, row in header.items()
        }
        end = first
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
            if tensor.begin != end:
                raise InvalidInput(f"tensor {name}: begins at byte {tensor.begin - first}, expected {end - first}")
            end += tensor.num_bytes
        if end != len(data):
            raise InvalidInput(f"not a safetensors file: {len(data) - end} bytes follow the last tensor")

    def values(self, name: str, start: int, stop: int) -> Vector:
        """Return a tensor's values from index `start` to before `stop`, row by row, as float32; wide ones rounded."""
        tensor = self.tensors[name]
        code, item_bytes = _DTYPES[tensor.dtype]
        place = tensor.begin + start * item_bytes
        values = np.frombuffer(self._data[place : place + (stop - start) * item_bytes], dtype=code)
        if tensor.dtype == "BF16":
            return (values.astype("<u4") << 16).view("<f4")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            return values.astype("<f4")

    def check_finite(self) -> None:
        """Look at every value.

        Raises:
            InvalidInput: one is not finite as float32; the text names its tensor and index.
        """
        for name, tensor in self.tensors.items():
            for start in range(0, tensor.num_values, CHECKED_VALUES):
                values = self.values(name, start, min(start + CHECKED_VALUES, tensor.num_values))
                is_fine = np.isfinite(values)
                if not is_fine.all():
                    index = int(np.argmin(is_fine))
                    raise InvalidInput(
                        f"tensor {name}: value {start + index} is {values[index]}, not finite as float32"
                    )


def _stored(name: str, row: Any, first: int, num_bytes: int) -> StoredTensor:
    """Check a row of the header; offsets count from `first`, and the file ends after `num_bytes`."""
    if not name.isprintable() or not 0 < len(name) <= 2 * MAX_TENSOR_NAME:
        raise InvalidInput(f"tensor name {name[:80]!r}: 1 to {2 * MAX_TENSOR_NAME} printable characters")
    match row:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            type(size) is int for size in (*shape, begin, end)
        ):
            pass
        case _:
            raise InvalidInput(f"tensor {name}: {str(row)[:80]} is no row of dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise InvalidInput(f"tensor {name}: type {dtype[:80]!r}, known: {', '.join(_DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_VALUES for size in shape):
        raise InvalidInput(
            f"tensor {name}: shape {str(shape)[:80]}, at most {MAX_DIMENSIONS} sizes of at most {MAX_VALUES} each"
        )
    length = math.prod(shape) * _DTYPES[dtype][1]
    if not 0 <= begin <= end <= num_bytes - first or end - begin != length:
        raise InvalidInput(
            f"tensor {name}: bytes {begin} to {end} of {num_bytes - first}, its type and shape take {length}"
        )
    return StoredTensor(dtype, tuple(shape), first + begin)
