"""Named tensors ↔ one flat vector.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.errors import LayoutError

Vector = npt.NDArray[np.float32]

MAX_TENSORS: Final = 100_000
MAX_VALUES: Final = 1 << 36
MAX_DIMENSIONS: Final = 8
MAX_TENSOR_NAME: Final = 256
DTYPES: Final = ("float32", "float16", "bfloat16")
BASIS_GROUP: Final = "basis"
"""Tensors of this group are set once, by the start of the job, and then stay: they come last in a layout."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor's place in the flat vector; made with a name, shape or dtype out of bounds, it is a `LayoutError`.

    Attributes:
        group: which part of the update it belongs to, such as ``"adapter"`` or ``"head"``.
        name: the tensor's name inside its model.
        shape: its shape; ``()`` is one value.
        dtype: what the model holds it in. The flat vector is float32 whatever this says.
        offset: index of its first value in the flat vector.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def __post_init__(self) -> None:
        """Check all but the offset, before anything is computed from the shape: it may be hostile."""
        _check(self)

    @property
    def num_values(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The ordered table of tensors that both sides agree on; `digest` stands for it in every message."""

    tensors: tuple[TensorSpec, ...]
    num_values: int = field(init=False)

    def __post_init__(self) -> None:
        """Check the table as a whole.

        Raises:
            LayoutError: a count or offset is out of bounds, or a (group, name) occurs twice.
        """
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise LayoutError(f"{len(self.tensors)} tensors: a layout holds 1 to {MAX_TENSORS}")
        offset = 0
        seen: set[tuple[str, str]] = set()
        seen_basis = False
        for tensor in self.tensors:
            if (tensor.group, tensor.name) in seen:
                raise LayoutError(f"tensor {tensor.group}/{tensor.name} occurs twice")
            seen.add((tensor.group, tensor.name))
            if tensor.offset != offset:
                raise LayoutError(f"tensor {tensor.name}: offset {tensor.offset}, expected {offset}")
            if tensor.group != BASIS_GROUP and seen_basis:
                raise LayoutError(f"tensor {tensor.group}/{tensor.name} comes after the basis")
            seen_basis = tensor.group == BASIS_GROUP
            offset += tensor.num_values
            if offset > MAX_VALUES:
                raise LayoutError(f"more than {MAX_VALUES} values up to tensor {tensor.name}")
        if self.tensors[0].group == BASIS_GROUP:
            raise LayoutError("all tensors are of the basis: nothing is trained")
        object.__setattr__(self, "num_values", offset)

    @staticmethod
    def of(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> Layout:
        """Build a layout from (group, name, shape, dtype) rows in the order of the flat vector."""
        specs: list[TensorSpec] = []
        offset = 0
        for group, name, shape, dtype in tensors:
            specs.append(TensorSpec(group, name, tuple(int(size) for size in shape), dtype, offset))
            offset += specs[-1].num_values
        return Layout(tuple(specs))

    @cached_property
    def moving(self) -> Layout:
        """What is trained and travels: all but the basis."""
        tensors = tuple(tensor for tensor in self.tensors if tensor.group != BASIS_GROUP)
        return self if len(tensors) == len(self.tensors) else Layout(tensors)

    @property
    def num_basis_values(self) -> int:
        """How many values the basis has; they are the last ones."""
        return self.num_values - self.moving.num_values

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_json`."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many values each tensor has."""
        return tuple(tensor.num_values for tensor in self.tensors)

    def to_json(self) -> bytes:
        """Return the canonical form: a JSON list of ``[group, name, shape, dtype]`` without spaces, ASCII only."""
        rows = [[t.group, t.name, list(t.shape), t.dtype] for t in self.tensors]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    @staticmethod
    def from_json(data: bytes) -> Layout:
        """Read what `to_json` wrote; the input is hostile.

        Raises:
            LayoutError: it is not such a table.
        """
        try:
            rows: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"layout is not JSON: {error}") from error
        if not isinstance(rows, list) or len(rows) > MAX_TENSORS:
            raise LayoutError(f"layout is not a list of at most {MAX_TENSORS} tensors")
        return Layout.of(_row(row) for row in rows)

    def flatten(self, tensors: Mapping[tuple[str, str], npt.NDArray[Any]]) -> Vector:
        """Return the tensors, keyed by (group, name), as one float32 vector of D values.

        Raises:
            LayoutError: a tensor is missing, superfluous, or of another shape.
        """
        extra = set(tensors) - {(t.group, t.name) for t in self.tensors}
        if extra:
            raise LayoutError(f"tensor {'/'.join(min(extra))} is not in the layout")
        flat_D = np.empty(self.num_values, dtype=np.float32)
        for tensor in self.tensors:
            value = tensors.get((tensor.group, tensor.name))
            if value is None:
                raise LayoutError(f"tensor {tensor.group}/{tensor.name} is missing")
            if value.shape != tensor.shape:
                raise LayoutError(f"tensor {tensor.name} has shape {value.shape}, the layout says {tensor.shape}")
            flat_D[tensor.offset : tensor.offset + tensor.num_values] = value.reshape(-1)
        return flat_D

    def unflatten(self, flat_D: Vector) -> dict[tuple[str, str], Vector]:
        """Return views into `flat_D`, one for each tensor, keyed by (group, name).

        Raises:
            LayoutError: the vector has another length.
        """
        if flat_D.shape != (self.num_values,):
            raise LayoutError(f"vector of shape {flat_D.shape}, the layout says ({self.num_values},)")
        return {(t.group, t.name): flat_D[t.offset : t.offset + t.num_values].reshape(t.shape) for t in self.tensors}


def _check(tensor: TensorSpec) -> None:
    for word, text in (("group", tensor.group), ("name", tensor.name)):
        if not 0 < len(text) <= MAX_TENSOR_NAME or not text.isprintable():
            raise LayoutError(f"tensor {word} {text[:80]!r}: 1 to {MAX_TENSOR_NAME} printable characters")
    if tensor.dtype not in DTYPES:
        raise LayoutError(f"tensor {tensor.name}: dtype {tensor.dtype[:80]!r}, known: {', '.join(DTYPES)}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise LayoutError(f"tensor {tensor.name}: {len(tensor.shape)} dimensions, at most {MAX_DIMENSIONS}")
    if any(not 0 < size <= MAX_VALUES for size in tensor.shape):
        raise LayoutError(f"tensor {tensor.name}: shape {str(tensor.shape)[:80]}, each size from 1 to {MAX_VALUES}")


def _row(row: Any) -> tuple[str, str, tuple[int, ...], str]:
    match row:
        case [str(group), str(name), list(shape), str(dtype)] if all(type(size) is int for size in shape):
            return group, name, tuple(shape), dtype
    raise LayoutError(f"layout row {str(row)[:80]} is not [group, name, shape, dtype]")
