"""All of a model's parameters are trained."""

from __future__ import annotations

from torch import nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedcore.adapters import FULL_GROUP, FullParams


class Full(Adapter):
    """Trains every floating-point parameter under its own name, in the model's order.

    Buffers, such as the running averages of batch normalisation, are not parameters: they stay on each
    client.
    """

    params: FullParams

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach`; nothing is added and nothing drawn."""
        return AdaptedModel(
            model, [(FULL_GROUP, name, p) for name, p in model.named_parameters() if p.is_floating_point()]
        )
