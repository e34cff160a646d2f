"""The start of a job from its clients' first gradients: the frozen factors and what is trained between them.

Shape legend: m × n an adapted matrix, r the rank; D values of all gradients together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from fedagg.lowrank import start
from fedcodec import Pipeline, build_pipeline
from fedcore.adapters import ADAPTER_GROUP, GRADIENT_START, LoraSbParams, basis_modules, gradient_layout
from fedcore.errors import InvalidInput, JobFailed
from fedcore.jobfile import Job
from fedcore.layout import BASIS_GROUP, Layout, TensorSpec, Vector
from fedcore.params import parse_params
from fedserver.state.vault import passing

SUMMED_VALUES: Final = 1 << 26
"""Of a float64 each: sums that are in memory at a time, unless one matrix has more."""
MAX_GRADIENT: Final = 1e30
"""Largest magnitude of a gradient's value: sums over all clients stay finite."""

Frames = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class GradientStart:
    """How a job starts: `params` are its adapter's."""

    params: LoraSbParams

    @cached_property
    def uplink(self) -> Pipeline:
        """How clients send their gradients."""
        return build_pipeline([self.params.gradient_codec])

    def factors(
        self,
        layout: Layout,
        base_D: Vector,
        frames: Frames,
        noise: Callable[[npt.NDArray[np.float64]], None] | None = None,
    ) -> tuple[Vector, Vector]:
        """Return the values that are trained from, and the basis, both in the order of the layout.

        Memory does not grow with the clients: frames are opened one by one, for models of more than `SUMMED_VALUES`
        several times. Sums are in float64, in the order of `frames`.

        Args:
            layout: of the job, with its basis.
            base_D: the values of version 0; those of each R are replaced.
            frames: opens each client's gradients, checked before, always in the same order.
            noise: is added to the sum of all clients, each value of which it is given once; None: nothing is.

        Raises:
            JobFailed: a sum of gradients is 0 everywhere; the text names the layer.
        """
        gradients, values = gradient_layout(layout), layout.moving.unflatten(base_D)
        ranks = {module: rank for module, (_, _, rank) in basis_modules(layout).items()}
        for matrices in _batches(gradients):
            total_D = self._sum(gradients, matrices, frames)
            if noise is not None:
                noise(total_D)
            for module, (m, n), at in ((t.name, t.shape, t.offset - matrices[0].offset) for t in matrices):
                try:
                    begun = start(total_D[at : at + m * n].reshape(m, n), ranks[module], self.params.step)
                except InvalidInput as error:
                    raise JobFailed(f"layer {module}: {error}") from error
                values[ADAPTER_GROUP, f"{module}.lora_R.weight"] = begun.r_rr
                values[BASIS_GROUP, f"{module}.lora_A.weight"] = begun.a_rn
                values[BASIS_GROUP, f"{module}.lora_B.weight"] = begun.b_mr
        flat = [values[tensor.group, tensor.name].ravel() for tensor in layout.tensors]
        cut = len(layout.moving.tensors)
        return np.concatenate(flat[:cut]), np.concatenate(flat[cut:])

    def _sum(self, gradients: Layout, matrices: list[TensorSpec], frames: Frames) -> npt.NDArray[np.float64]:
        first, end = matrices[0].offset, matrices[-1].offset + matrices[-1].num_values
        total_D = np.zeros(end - first)
        for frame in frames():
            for part in passing(self.uplink.open(frame, gradients.sizes), frame):
                if part.start >= end:
                    break
                left, right = max(first, part.start), min(end, part.start + part.size)
                if left < right:
                    total_D[left - first : right - first] += part.dense()[left - part.start : right - part.start]
        return total_D


def gradient_start(job: Job) -> GradientStart | None:
    """Return how a job starts, None for one that starts from version 0 as it is.

    Raises:
        InvalidInput: a parameter of its adapter is unknown or out of bounds.
    """
    if job.adapter.name not in GRADIENT_START:
        return None
    return GradientStart(parse_params(LoraSbParams, job.adapter.params, "adapter"))


def _batches(gradients: Layout) -> Iterator[list[TensorSpec]]:
    """Yield consecutive matrices that are summed up together."""
    batch: list[TensorSpec] = []
    for tensor in gradients.tensors:
        if batch and tensor.offset + tensor.num_values - batch[0].offset > SUMMED_VALUES:
            yield batch
            batch = []
        batch.append(tensor)
    yield batch
