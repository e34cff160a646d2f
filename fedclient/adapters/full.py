"""A model's own parameters are trained: all of them, or some."""

from __future__ import annotations

from torch import nn

from fedclient.adapters.base import AdaptedModel, Adapter
from fedclient.adapters.trainable import find_trainable
from fedcore.adapters import FullParams


class Full(Adapter):
    """Trains floating-point parameters whose names match `trainable`, each under its own, in the model's order.

    Buffers, such as the running averages of batch normalisation, are not parameters: they stay on each
    client.
    """

    params: FullParams

    def attach(self, model: nn.Module, seed: int) -> AdaptedModel:
        """See `Adapter.attach` and `find_trainable`; nothing is added and nothing drawn."""
        return AdaptedModel(model, find_trainable(model, self.params.trainable))
