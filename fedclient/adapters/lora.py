"""Low-rank adaptation of linear layers (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).

The tensors carry the names and shapes that `fedcore.adapters` and the `peft` package know.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedcore.adapters import ADAPTER_GROUP, LoraParams
from fedcore.errors import InvalidInput
from fedcore.rng import stream


class LoraLinear(nn.Module):
    """`base(x) + (alpha / rank) · B A dropout(x)`; only A (rank × in) and B (out × rank) are trained.

    A is uniform in ±1/sqrt(in), which is Kaiming's bound with a = sqrt(5), drawn from `generator`; B is zero,
    so that the adapted layer starts as the base layer.
    """

    def __init__(self, base: nn.Linear, params: LoraParams, generator: np.random.Generator) -> None:
        super().__init__()
        self.base = base
        self.lora_A = _linear_like(base, base.in_features, params.rank)
        self.lora_B = _linear_like(base, params.rank, base.out_features)
        self.dropout = nn.Dropout(params.dropout)
        self.scale = params.alpha / params.rank
        bound = 1 / math.sqrt(base.in_features)
        a = generator.uniform(-bound, bound, (params.rank, base.in_features)).astype(np.float32)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.from_numpy(a))
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output."""
        adapted: Tensor = self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale
        return adapted


class Lora(Adapter):
    """Adds two factors to each linear layer whose path, or the last part of it, matches one of `targets`."""

    params: LoraParams

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach`. Each layer draws from a stream of its own, named by its path."""
        # Exactly nn.Linear: subclasses may not call forward at all (nn.MultiheadAttention reads its weight).
        linears = [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]
        chosen = [(path, layer) for path, layer in linears if path and self._is_target(path)]
        if not chosen:
            known = ", ".join(path for path, _ in linears[:20] if path) or "none inside another module"
            raise InvalidInput(f"adapter.targets {self.params.targets}: match no linear layer; the model has: {known}")
        trained: list[tuple[str, str, nn.Parameter]] = []
        for path, layer in chosen:
            adapted = LoraLinear(layer, self.params, stream(seed, "lora", path))
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, adapted)
            for name, parameter in adapted.named_parameters():
                if name in ("lora_A.weight", "lora_B.weight"):
                    trained.append((ADAPTER_GROUP, f"{path}.{name}", parameter))
        return AdaptedModel(model, trained)

    def _is_target(self, path: str) -> bool:
        return any(
            fnmatchcase(path, pattern) or fnmatchcase(path.rpartition(".")[2], pattern)
            for pattern in self.params.targets
        )


def _linear_like(base: nn.Linear, num_inputs: int, num_outputs: int) -> nn.Linear:
    """Return a layer without bias and without initial values: nothing is drawn from torch's global generator."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, num_inputs, num_outputs, bias=False, device=base.weight.device, dtype=base.weight.dtype
    )
    return layer
