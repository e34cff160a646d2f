"""A task file for `fedclient run --task-file`: a small base model, of which a client's option flips one bit."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from fedclient.tasks.base import LocalData, Split, Task
from fedcore.params import Params
from fedcore.rng import stream


class FlippedParams(Params):
    """The job says nothing."""


class FlippedOptions(Params):
    """What is wrong with this client's base model."""

    flip: int = Field(default=-1, ge=-1, le=239, description="Bit of the first layer's weights, each byte's 8 in turn.")


class Flipped(Task):
    """Points in five dimensions, four classes."""

    name = "flipped"
    params: FlippedParams
    options: FlippedOptions

    def load(self) -> LocalData:
        drawn = stream(self.seed, "points").standard_normal((24, 5))
        points = Split(torch.from_numpy(drawn).float(), torch.arange(24) % 4)
        return LocalData(points, points)

    def build_model(self) -> nn.Module:
        first = nn.Linear(5, 6)
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 4))
        if self.options.flip >= 0:
            first.weight.data.view(-1).view(torch.uint8)[self.options.flip // 8] ^= 1 << self.options.flip % 8
        return model
