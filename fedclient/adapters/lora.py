"""Low-rank adaptation of linear layers (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).

The tensors carry the names and shapes that `fedcore.adapters` and the `peft` package know.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedclient.adapters.targets import Target, find_targets, replace
from fedclient.adapters.trainable import find_trainable
from fedcore.adapters import ADAPTER_GROUP, LoraParams
from fedcore.changes import new_rows
from fedcore.rng import stream


class LoraLinear(nn.Module):
    """`base(x) + (alpha / rank) · B A dropout(x)`; only A (rank × in) and B (out × rank) are trained.

    A is drawn from `generator` (`fedcore.changes.new_rows`); B is zero, so that the adapted layer starts as the base
    layer.

    Both are float32 beside a base of any type: in bfloat16, small steps would be rounded away, and a quantised base
    has no type to train in.
    """

    def __init__(self, target: Target, params: LoraParams, generator: np.random.Generator) -> None:
        super().__init__()
        self.base = target.layer
        device = next(target.layer.parameters()).device
        self.lora_A = _factor(target.num_inputs, params.rank, device)
        self.lora_B = _factor(params.rank, target.num_outputs, device)
        self.dropout = nn.Dropout(params.dropout)
        self.is_transposed = target.is_transposed
        self.change_mn: Tensor | None = None
        self.scale = params.alpha / params.rank
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.from_numpy(new_rows(generator, params.rank, target.num_inputs)))
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, in the base layer's type."""
        output: Tensor = self.base(x)
        update: Tensor = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))) * self.scale
        if self.change_mn is not None:
            update = update + nn.functional.linear(x.to(self.change_mn.dtype), self.change_mn)
        return output + update.to(output.dtype)

    def change_base(self, change_mn: Tensor) -> None:
        """Add to the base's weight, or beside it where that has fewer bits than float32: there it would be lost."""
        weight = self.base.weight
        if isinstance(weight, Tensor) and weight.dtype == torch.float32:
            weight.add_(change_mn.T if self.is_transposed else change_mn)
        else:
            self.change_mn = change_mn if self.change_mn is None else self.change_mn + change_mn


class Lora(Adapter):
    """Adds two factors to each linear layer whose path, or the last part of it, matches one of `targets`."""

    params: LoraParams
    trained: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")
    frozen: ClassVar[tuple[str, ...]] = ()

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach`, `find_targets` and `find_trainable`.

        Each layer draws from a stream of its own, named by its path.
        """
        targets = find_targets(model, self.params.targets, self.params.rank)
        whole = find_trainable(model, self.params.trainable, targets)
        trained: list[tuple[str, str, nn.Parameter]] = []
        basis: list[tuple[str, nn.Parameter]] = []
        for target in targets:
            adapted = LoraLinear(target, self.params, stream(seed, "lora", target.path))
            replace(model, target.path, adapted)
            for name, parameter in adapted.named_parameters():
                if name in self.trained:
                    trained.append((ADAPTER_GROUP, f"{target.path}.{name}", parameter))
                elif name in self.frozen:
                    basis.append((f"{target.path}.{name}", parameter))
        return AdaptedModel(model, [*trained, *whole], basis)


class FfaLora(Lora):
    """`lora` of which A stays as it was drawn from the job's seed, the same on every client: a mean of B is exact.

    Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024.
    """

    trained: ClassVar[tuple[str, ...]] = ("lora_B.weight",)
    frozen: ClassVar[tuple[str, ...]] = ("lora_A.weight",)


class RoLora(Lora):
    """`lora` of which B is trained from even versions and A from odd ones, so that a mean of either is exact.

    Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, 2025.
    """


def _factor(num_inputs: int, num_outputs: int, device: torch.device) -> nn.Linear:
    """Return a layer without bias and without initial values: nothing is drawn from torch's global generator."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, num_inputs, num_outputs, bias=False, device=device, dtype=torch.float32
    )
    return layer
