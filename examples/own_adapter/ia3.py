"""An adapter of your own: (IA)³, a vector that scales a layer's outputs (Liu et al., 2022, arXiv:2205.05638)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedclient.adapters.targets import find_targets, replace
from fedcore.params import Params


class Ia3Keys(Params):
    """What a job file may say in `[adapter]`."""

    targets: list[str] = Field(default=["*"], min_length=1)


class Scaled(nn.Module):
    """`scale * base(x)`; the scale is 1 to begin with."""

    def __init__(self, base: nn.Module, size: int) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(size, device=next(base.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled outputs, in the base layer's type."""
        return torch.mul(self.base(x), self.scale.to(x.dtype))


class Ia3(Adapter):
    """Trains one vector for each linear layer that matches `targets`."""

    params: Ia3Keys

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach`; nothing is drawn."""
        chosen = [(t.path, Scaled(t.layer, t.num_outputs)) for t in find_targets(model, self.params.targets, rank=1)]
        for path, layer in chosen:
            replace(model, path, layer)
        return AdaptedModel(model, [("adapter", f"{path}.scale", layer.scale) for path, layer in chosen])
