"""A task file for `fedclient run --task-file`: its training waits until a test lets it go on (`tests.support.gate`)."""

from __future__ import annotations

import socket

import torch
from pydantic import Field
from torch import nn

from fedclient.adapters.base import AdaptedModel
from fedclient.tasks.base import LocalData, Split, Task, TrainingRun
from fedcore.params import Params


class GatedParams(Params):
    """The job says nothing."""


class GatedOptions(Params):
    """Where the test listens."""

    gate: int = Field(ge=1, le=65535)


class Gated(Task):
    """Two points, two classes."""

    name = "gated"
    params: GatedParams
    options: GatedOptions

    def load(self) -> LocalData:
        points = Split(torch.eye(2), torch.tensor([0, 1]))
        return LocalData(points, points)

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def train(self, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
        with socket.create_connection(("127.0.0.1", self.options.gate)) as gate:
            gate.recv(1)
            return super().train(model, data, run)
