"""What a job has trained, as every format of an export sees it.

Shape legend: W is m × n = outputs × inputs, R the rank of its update.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedagg.lowrank import Factors, combine, recompress
from fedcore.adapters import (
    ADAPTER_GROUP,
    FULL_GROUP,
    GRADIENT_START,
    LoraParams,
    LoraSbParams,
    basis_modules,
    lora_modules,
)
from fedcore.changes import Change, read_change
from fedcore.errors import LayoutError
from fedcore.layout import BASIS_GROUP, TensorSpec, Vector
from fedcore.params import parse_params
from fedserver.export.base import Exportable, State


class Update(NamedTuple):
    """The whole update of an adapted module: its weight is W + (alpha / R) · B A."""

    b_mr: Vector
    a_rn: Vector
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a_rn)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def updates_of(what: Exportable, state: State) -> dict[str, Update]:
    """Return the update of each adapted module by its path, in layout order; empty if nothing is adapted.

    A third factor is multiplied into B, in float64: W + B R A is W + (B R) A. Changes of the frozen matrices are part
    of the update: W is as it was in the beginning.

    Args:
        what: the version.
        state: its values, raw little-endian float32.

    Raises:
        LayoutError: the layout is not that of the job's adapter.
        InvalidInput: the job's `[adapter]` keys are not those of its adapter.
    """
    if not what.is_lora:
        return {}
    params = what.job.adapter.params
    values = what.layout.unflatten(np.frombuffer(state, dtype="<f4"))
    found: dict[str, Update] = {}
    if what.job.adapter.name in GRADIENT_START:
        rank = parse_params(LoraSbParams, params, "adapter").rank
        known = {f"{module}.lora_R.weight" for module in basis_modules(what.layout)}
        for tensor in what.layout.moving.tensors:
            if tensor.group != FULL_GROUP and tensor.name not in known:
                raise LayoutError(f"tensor {tensor.name} is trained beside the factors, and has no place in an adapter")
        for module in basis_modules(what.layout):
            a_rn, b_mr = (values[BASIS_GROUP, f"{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
            r_rr = values[ADAPTER_GROUP, f"{module}.lora_R.weight"]
            found[module] = Update((b_mr.astype(np.float64) @ r_rr).astype("<f4"), a_rn, float(rank))
    else:
        lora = parse_params(LoraParams, params, "adapter")
        rank = lora.rank
        factors = {name: value for (group, name), value in values.items() if group != FULL_GROUP}
        if len(factors) + len(whole_tensors(what)) < len(values):
            raise LayoutError("a LoRA layout has each tensor name once; here one is in two groups")
        for module in lora_modules(what.layout):
            found[module] = Update(factors[f"{module}.lora_B.weight"], factors[f"{module}.lora_A.weight"], lora.alpha)
    for module, update in found.items():
        if update.rank != rank:
            raise LayoutError(f"module {module} has rank {update.rank}, the job says {rank}")
    return _with_changes(what, found)


def _with_changes(what: Exportable, updates: dict[str, Update]) -> dict[str, Update]:
    """Return updates of the frozen matrices as they were in the beginning, in as few ranks as that takes."""
    opened = [read_change(memoryview(change), what.layout) for change in what.changes]
    found = dict(updates)
    for rows in zip(*opened, strict=True):
        own = updates[rows[0].module]
        parts = [Factors(own.b_mr, own.a_rn, own.scale), *map(_in_factors, rows)]
        whole = combine(parts, [1.0] * len(parts))
        if whole.rank < min(whole.shape):
            whole = recompress(whole)
        else:  # as exact, and without a decomposition that takes minutes for a large matrix
            product_mn = whole.b_mr.astype(np.float64) @ whole.a_rn
            whole = _in_factors(Change(rows[0].module, product_mn.astype(np.float32), None))
        if whole.rank:  # else nothing was trained yet, and peft has no adapters of rank 0
            found[rows[0].module] = Update(whole.b_mr, whole.a_rn, float(whole.rank))
    return found


def whole_tensors(what: Exportable) -> list[TensorSpec]:
    """Return the tensors that are trained whole, each under its name in the model."""
    return [tensor for tensor in what.layout.tensors if tensor.group == FULL_GROUP]


def _in_factors(change: Change) -> Factors:
    """Return a change as factors; of a dense one, one factor is the identity."""
    if change.a_rn is not None:
        return Factors(change.b_mr, change.a_rn)
    m, n = change.b_mr.shape
    identity = np.eye(min(m, n), dtype=np.float32)
    return Factors(identity, change.b_mr) if m < n else Factors(change.b_mr, identity)
