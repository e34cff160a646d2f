"""How a version is made where the rule works on low-rank factors: matrix by matrix, of all clients' updates at once.

Runs in a worker thread. In memory are one matrix's factors of every client, and what decoding one frame takes.

Shape legend: K clients, D values of what one of them sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from fedagg import FactorRule
from fedagg.lowrank import Factors
from fedcore.adapters import ADAPTER_GROUP, LoraParams
from fedcore.changes import change_bytes, changed_modules, drawing, read_change
from fedcore.errors import InvalidInput, JobFailed
from fedcore.layout import Layout, Vector
from fedcore.params import parse_params
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.plan import INITIAL, Plan
from fedserver.rounds.traffic import VALUE_BYTES
from fedserver.state.vault import Kept, Vault, VaultWriter, passing

_FACTORS: Final = (".lora_A.weight", ".lora_B.weight")


class Merger:
    """Computes one version; see the module's text.

    Args:
        vault: where the updates are.
        plan: of the job; its rule is a `FactorRule`.
        attempt: sealed, with at least one accepted update.
        layout: of the job.
        base_D: the version that the updates were computed from.
    """

    def __init__(self, vault: Vault, plan: Plan, attempt: Attempt, layout: Layout, base_D: Vector) -> None:
        assert isinstance(plan.rule, FactorRule)
        self._rule, self._plan, self._version, self._layout = plan.rule, plan, attempt.version, layout
        lora = parse_params(LoraParams, plan.job.adapter.params, "adapter")
        self._scale = lora.alpha / lora.rank
        self._base = layout.moving.unflatten(base_D)
        # In one order, so that a server that was killed computes the same bits again.
        clients = sorted(attempt.frames)
        self._weights = [plan.weight_of(attempt.headers[client]) for client in clients]
        sent_by = {client: plan.sending.layout(layout, client, attempt.version) for client in clients}
        self._deltas = [
            sent.unflatten(_decoded(vault, plan, attempt, client, sent)) for client, sent in sent_by.items()
        ]

    def write(self, state: VaultWriter, change: VaultWriter) -> None:
        """Write the new version's values and, where the rule changes the frozen matrices, their change.

        Raises:
            JobFailed: a result is not finite; the text names the module.
        """
        modules = changed_modules(self._layout)
        made: dict[str, Factors] = {}
        for tensor in self._layout.moving.tensors:
            module = tensor.name.removesuffix(_FACTORS[0]).removesuffix(_FACTORS[1])
            if tensor.group != ADAPTER_GROUP or module not in modules:
                values = self._mean((tensor.group, tensor.name))
            else:
                merged = made.pop(module, None)
                if merged is None:
                    merged = made[module] = self._merge(module, change)
                values = merged.a_rn if tensor.name.endswith(_FACTORS[0]) else merged.b_mr
            state.write(np.ascontiguousarray(values, dtype="<f4").data.cast("B"))

    def _merge(self, module: str, change: VaultWriter) -> Factors:
        a, b = ((ADAPTER_GROUP, module + name) for name in _FACTORS)
        base = Factors(self._base[b], self._base[a], self._scale)
        clients = []
        for delta in self._deltas:
            rank = len(delta[a])
            clients.append(Factors(base.b_mr[:, :rank] + delta[b], base.a_rn[:rank] + delta[a], self._scale))
        fresh = drawing(self._plan.job.job.seed, module, self._version)
        try:
            merged = self._rule.merge(base, clients, self._weights, fresh)
        except InvalidInput as error:
            raise JobFailed(f"rule {self._rule.name}, layer {module}: {error}") from error
        if self._rule.changes_base:
            added = Factors(base.b_mr[:, :0], base.a_rn[:0]) if merged.change is None else merged.change
            for piece in change_bytes(added.b_mr, added.a_rn):
                change.write(piece)
        return merged.factors

    def _mean(self, key: tuple[str, str]) -> Vector:
        """Return a tensor that is no factor, moved by the weighted mean of what clients have changed."""
        total, all_weights = np.zeros(self._base[key].shape), sum(self._weights)
        for weight, delta in zip(self._weights, self._deltas, strict=True):
            total += np.multiply(delta[key], weight / all_weights, dtype=np.float64)
        moved: Vector = (self._base[key] + total).astype(np.float32)
        return moved


def _decoded(vault: Vault, plan: Plan, attempt: Attempt, client: str, sent: Layout) -> Vector:
    """Return what a client has sent: where values travel as they are, they stay in the file."""
    frame = vault.open(attempt.frames[client], attempt.headers[client].frame_bytes)
    if plan.uplink.wire_ids == INITIAL.wire_ids:
        return np.frombuffer(frame[-VALUE_BYTES * sent.num_values :], dtype="<f4")
    values_D = np.frombuffer(vault.scratch(VALUE_BYTES * sent.num_values), dtype=np.float32)
    for part in passing(plan.uplink.open(frame, sent.sizes), frame):
        values_D[part.start : part.start + part.size] = part.dense()
    return values_D


def compact(vault: Vault, layout: Layout, changes: Iterable[str | Kept], into: VaultWriter) -> None:
    """Write the sum of changes as one, not in factors: together they are longer than the matrices."""
    opened = [read_change(vault.open(change), layout) for change in changes]
    for rows in zip(*opened, strict=True):
        total_mn = rows[0].dense()
        for row in rows[1:]:
            total_mn += row.dense()
        for piece in change_bytes(total_mn.astype(np.float32), None):
            into.write(piece)
