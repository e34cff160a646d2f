"""Changes of a job's frozen matrices, in factors: W becomes W + B A, version after version.

A change as bytes: for each adapted module, in layout order, the rank R (u32, little-endian), then B (m × R) and A
(R × n) row by row as little-endian float32; or `DENSE` instead of the rank, and then the sum itself (m × n), which is
shorter from R (m + n) = m n on. A rank of 0 is a module that stays as it is.

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
DENSE: Final = (1 << 32) - 1

Matrix = npt.NDArray[np.float32]


class Change(NamedTuple):
    """What is added to one module's matrix, in read-only views: B (m × R) times A (R × n), where R may be 0.

    Attributes:
        b_mr: B; where A is None the sum itself, m × n.
    """

    module: str
    b_mr: Matrix
    a_rn: Matrix | None

    def dense(self) -> npt.NDArray[np.float64]:
        """Return what is added, m × n."""
        b_mr = self.b_mr.astype(np.float64)
        return b_mr if self.a_rn is None else b_mr @ self.a_rn


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
    return sum(_RANK_BYTES + 4 * m * n for m, n in changed_modules(layout).values())


def max_changes(layout: Layout) -> int:
    """Return the most changes that there can be since one that stands for all before: see `compact_above`."""
    return compact_above(layout) // (_RANK_BYTES * len(changed_modules(layout))) + 1


def compact_above(layout: Layout) -> int:
    """Return the bytes above which the changes of a job are put together into one."""
    return 2 * max_change_bytes(layout)


def change_bytes(b_mr: Matrix, a_rn: Matrix | None) -> Iterator[memoryview]:
    """Yield the bytes of one module's change, in its shorter form; the fields are those of `Change`."""
    if a_rn is not None and a_rn.shape[0] * (b_mr.shape[0] + a_rn.shape[1]) >= b_mr.shape[0] * a_rn.shape[1]:
        b_mr, a_rn = (b_mr.astype(np.float64) @ a_rn).astype(np.float32), None
    rank, factors = (DENSE, [b_mr]) if a_rn is None else (len(a_rn), [b_mr, a_rn])
    yield memoryview(rank.to_bytes(_RANK_BYTES, "little"))
    for factor in factors:
        if factor.size:
            yield np.ascontiguousarray(factor, dtype="<f4").data.cast("B")


def read_change(data: memoryview, layout: Layout) -> Iterator[Change]:
    """Yield the changes of all modules, in the order of the layout; the input is hostile.

    Raises:
        FrameError: it does not have the length that it says, factors are no shorter than their product, or a value is
            not finite.
        LayoutError: see `changed_modules`.
    """
    start = 0
    for module, (m, n) in changed_modules(layout).items():
        if len(data) - start < _RANK_BYTES:
            raise FrameError(f"change of {len(data)} bytes: ends before the rank of {module}")
        rank = int.from_bytes(data[start : start + _RANK_BYTES], "little")
        start += _RANK_BYTES
        size = m * n if rank == DENSE else rank * (m + n)
        if size > m * n or (rank != DENSE and size == m * n):
            raise FrameError(f"change of {module}: rank {rank}, below {m * n / (m + n):g}")
        if len(data) - start < 4 * size:
            raise FrameError(f"change of {len(data)} bytes: ends within {module}, of {size} values")
        values = np.frombuffer(data, dtype="<f4", count=size, offset=start)
        if not np.isfinite(values).all():
            raise FrameError(f"change of {module}: a value is not finite")
        start += 4 * size
        if rank == DENSE:
            yield Change(module, values.reshape(m, n), None)
        else:
            yield Change(module, values[: m * rank].reshape(m, rank), values[m * rank :].reshape(rank, n))
    if start != len(data):
        raise FrameError(f"change of {len(data)} bytes: goes on after its {start}")


def next_revision(revision: str, digest: str) -> str:
    """Return the revision after a change whose bytes have that SHA-256 (hex)."""
    return hashlib.sha256(f"{revision}{digest}".encode("ascii")).hexdigest()
