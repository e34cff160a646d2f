"""The start of a job from its clients' first gradients: the frozen factors and what is trained between them.

Shape legend: m × n an adapted matrix, r the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedagg.lowrank import Matrix, add_gradients, start
from fedcodec import Pipeline, build_pipeline
from fedcore.adapters import GRADIENT_START, LoraSbParams, basis_modules, gradient_layout
from fedcore.jobfile import Job
from fedcore.layout import Layout, Vector
from fedcore.params import parse_params
from fedcore.part import Part, dense_blocks

BLOCK_VALUES: Final = 1 << 18
MAX_GRADIENT: Final = 1e30
"""Largest magnitude of a gradient's value: sums over all clients stay finite."""


@dataclass(frozen=True)
class GradientStart:
    """How a job starts: `params` are its adapter's."""

    params: LoraSbParams

    @property
    def uplink(self) -> Pipeline:
        """How clients send their gradients."""
        return build_pipeline([{"codec": "sign" if self.params.votes else "raw"}])

    def factors(self, layout: Layout, base_D: Vector, frames: Sequence[memoryview]) -> tuple[Vector, Vector]:
        """Return the values that are trained from, and the basis, both in the order of the layout.

        One matrix of m × n at a time is in memory. The sum is in float64, in the order of `frames`.

        Args:
            layout: of the job, with its basis.
            base_D: the values of version 0; those of each R are replaced.
            frames: each client's gradients, checked before.

        Raises:
            InvalidInput: a sum of gradients is 0 everywhere.
        """
        gradients = gradient_layout(layout)
        sent = [_values(self.uplink.open(frame, gradients.sizes)) for frame in frames]
        trained, basis = layout.moving.unflatten(base_D.copy()), {}
        for module, (m, n, rank) in basis_modules(layout).items():
            found = start(add_gradients(_take(values, m, n) for values in sent), rank, self.params.step)
            (key,) = [key for key in trained if key[1] == f"{module}.lora_R.weight"]
            trained[key] = found.r_rr
            basis[f"{module}.lora_A.weight"], basis[f"{module}.lora_B.weight"] = found.a_rn, found.b_mr
        frozen = [basis[tensor.name] for tensor in layout.tensors[len(layout.moving.tensors) :]]
        return layout.moving.flatten(trained), np.concatenate([matrix.ravel() for matrix in frozen])


def gradient_start(job: Job) -> GradientStart | None:
    """Return how a job starts, None for one that starts from version 0 as it is.

    Raises:
        InvalidInput: a parameter of its adapter is unknown or out of bounds.
    """
    if job.adapter.name not in GRADIENT_START:
        return None
    return GradientStart(parse_params(LoraSbParams, job.adapter.params, "adapter"))


class _Values:
    """One client's values, read from their start to their end."""

    def __init__(self, blocks: Iterator[Vector]) -> None:
        self._blocks = blocks
        self._left: Vector = np.empty(0, dtype=np.float32)

    def take(self, count: int) -> Vector:
        """Return the next values."""
        found = np.empty(count, dtype=np.float32)
        filled = 0
        while filled < count:
            if not self._left.size:
                self._left = next(self._blocks)
            part = self._left[: count - filled]
            found[filled : filled + part.size] = part
            self._left = self._left[part.size :]
            filled += part.size
        return found


def _values(parts: Iterator[Part]) -> _Values:
    return _Values(dense_blocks(parts, BLOCK_VALUES))


def _take(values: _Values, m: int, n: int) -> Matrix:
    return values.take(m * n).reshape(m, n)
