"""Changes of a job's frozen matrices, in factors: W becomes W + B A, version after version.

A change as bytes: for each adapted module, in layout order, the rank R (u32, little-endian), then B (m × R) and A
(R × n) row by row as little-endian float32. A rank of 0 is a module that stays as it is.

A *revision* names the frozen matrices as they are after a chain of changes: SHA-256 (hex) over the revision before and
the digest of the change, both as text; empty before the first change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fedcore.adapters import ADAPTER_GROUP, lora_modules
from fedcore.errors import FrameError
from fedcore.layout import Layout, Vector
from fedcore.rng import stream

_A: Final = ".lora_A.weight"
_B: Final = ".lora_B.weight"
_RANK_BYTES: Final = 4

Matrix = npt.NDArray[np.float32]


class Change(NamedTuple):
    """What is added to one module's matrix: B (m × R) times A (R × n), read-only views; R may be 0."""

    module: str
    b_mr: Matrix
    a_rn: Matrix


def changed_modules(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return m and n of each module with factors A and B, both trained, in the order of the layout.

    Raises:
        LayoutError: a factor is without the other, their ranks differ, or there are none.
    """
    moving = layout.moving
    shapes = {tensor.name: tensor.shape for tensor in moving.tensors}
    return {module: (shapes[module + _B][0], shapes[module + _A][1]) for module in lora_modules(moving)}


def new_rows(generator: np.random.Generator, rank: int, num_inputs: int) -> Matrix:
    """Return an A to begin with, r × n, uniform in ±1/√n: Kaiming's bound with a = √5, as LoRA's."""
    bound = 1 / math.sqrt(num_inputs)
    return generator.uniform(-bound, bound, (rank, num_inputs)).astype(np.float32)


def drawing(seed: int, module: str, version: int) -> np.random.Generator:
    """Return what a module's new factors are drawn from, which replace those trained from `version`."""
    return stream(seed, "factors", module, version)


def begin_again(layout: Layout, seed: int, version: int) -> Vector | None:
    """Return the values that move in version + 1 if all factors begin anew with it; None: more moves than factors.

    A client that knows them need not download them.

    Raises:
        LayoutError: see `changed_modules`.
    """
    modules = changed_modules(layout)
    values = np.zeros(layout.moving.num_values, dtype=np.float32)
    for tensor in layout.moving.tensors:
        module = tensor.name.removesuffix(_A).removesuffix(_B)
        if tensor.group != ADAPTER_GROUP or module not in modules:
            return None
        if tensor.name.endswith(_A):
            drawn = new_rows(drawing(seed, module, version), *tensor.shape)
            values[tensor.offset : tensor.offset + tensor.num_values] = drawn.ravel()
    return values


def max_change_bytes(layout: Layout) -> int:
    """Return the most bytes that a change of these modules can have; raises like `changed_modules`."""
    sizes = changed_modules(layout).values()
    return sum(_RANK_BYTES + 4 * min(m, n) * (m + n) for m, n in sizes)


def max_changes(layout: Layout) -> int:
    """Return the most changes that there can be since one that stands for all before: see `compact_above`."""
    return compact_above(layout) // (_RANK_BYTES * len(changed_modules(layout))) + 1


def compact_above(layout: Layout) -> int:
    """Return the bytes above which the changes of a job are put together into one."""
    return 2 * max_change_bytes(layout)


def change_bytes(b_mr: Matrix, a_rn: Matrix) -> Iterator[memoryview]:
    """Yield the bytes of one module's change."""
    yield memoryview(len(a_rn).to_bytes(_RANK_BYTES, "little"))
    for factor in (b_mr, a_rn):
        if factor.size:
            yield np.ascontiguousarray(factor, dtype="<f4").data.cast("B")


def read_change(data: memoryview, layout: Layout) -> Iterator[Change]:
    """Yield the changes of all modules, in the order of the layout; the input is hostile.

    Raises:
        FrameError: it does not have the length that it says, a rank is above min(m, n), or a value is not finite.
        LayoutError: see `changed_modules`.
    """
    start = 0
    for module, (m, n) in changed_modules(layout).items():
        if len(data) - start < _RANK_BYTES:
            raise FrameError(f"change of {len(data)} bytes: ends before the rank of {module}")
        rank = int.from_bytes(data[start : start + _RANK_BYTES], "little")
        start += _RANK_BYTES
        if rank > min(m, n):
            raise FrameError(f"change of {module}: rank {rank}, at most {min(m, n)}")
        if len(data) - start < 4 * rank * (m + n):
            raise FrameError(f"change of {len(data)} bytes: ends within {module}, of rank {rank}")
        values = np.frombuffer(data, dtype="<f4", count=rank * (m + n), offset=start)
        if not np.isfinite(values).all():
            raise FrameError(f"change of {module}: a value is not finite")
        start += 4 * values.size
        yield Change(module, values[: m * rank].reshape(m, rank), values[m * rank :].reshape(rank, n))
    if start != len(data):
        raise FrameError(f"change of {len(data)} bytes: goes on after its {start}")


def next_revision(revision: str, digest: str) -> str:
    """Return the revision after a change whose bytes have that SHA-256 (hex)."""
    return hashlib.sha256(f"{revision}{digest}".encode("ascii")).hexdigest()
