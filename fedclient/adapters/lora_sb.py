"""LoRA-SB: a small square matrix is trained between two frozen factors.

Ponkshe et al., Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning, 2024; Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning, 2025.

Shape legend: W is m × n, r the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedclient.adapters.targets import Target, find_targets, replace
from fedclient.adapters.trainable import find_trainable
from fedcore.adapters import ADAPTER_GROUP, LoraSbParams
from fedcore.errors import InvalidInput


class LoraSbLinear(nn.Module):
    """`base(x) + B R A dropout(x)`; R is trained. All three are 0 until the job has started.

    There is no scale: with orthonormal B and A a step of R is the projected step of W.
    """

    def __init__(self, target: Target, params: LoraSbParams) -> None:
        super().__init__()
        self.base = target.layer
        device = next(target.layer.parameters()).device
        # Parameters, not buffers: they stay the same objects when the model moves to a device. R is a layer, because
        # gradients of single examples are taken layer by layer.
        self.lora_A = nn.Parameter(torch.zeros(params.rank, target.num_inputs, device=device), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(target.num_outputs, params.rank, device=device), requires_grad=False)
        self.lora_R: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, params.rank, params.rank, bias=False, device=device, dtype=torch.float32
        )
        nn.init.zeros_(self.lora_R.weight)
        self.dropout = nn.Dropout(params.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, in the base layer's type."""
        output: Tensor = self.base(x)
        inner = nn.functional.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)
        update = nn.functional.linear(self.lora_R(inner), self.lora_B)
        return output + update.to(output.dtype)


class LoraSb(Adapter):
    """Puts R between two factors that the job's first round sets, beside each layer that matches one of `targets`."""

    params: LoraSbParams

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach`, `find_targets` and `find_trainable`; draws nothing.

        Raises:
            InvalidInput: also for a quantised layer, by whose weight there is no gradient.
        """
        targets = find_targets(model, self.params.targets, self.params.rank)
        whole = find_trainable(model, self.params.trainable, targets)
        trained: list[tuple[str, str, nn.Parameter]] = []
        basis: list[tuple[str, nn.Parameter]] = []
        for target in targets:
            weight = target.layer.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise InvalidInput(f"adapter lora-sb: {target.path} is quantised, and its start needs a gradient by it")
            adapted = LoraSbLinear(target, self.params)
            replace(model, target.path, adapted)
            trained.append((ADAPTER_GROUP, f"{target.path}.lora_R.weight", adapted.get_parameter("lora_R.weight")))
            basis.append((f"{target.path}.lora_A.weight", adapted.lora_A))
            basis.append((f"{target.path}.lora_B.weight", adapted.lora_B))
        return AdaptedModel(model, [*trained, *whole], basis, targets)
