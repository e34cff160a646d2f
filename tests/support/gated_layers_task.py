"""As `gated_task.py`, with layers to adapt; a client waits before its first gradient too."""

from __future__ import annotations

import socket

import torch
from pydantic import Field
from torch import nn

from fedclient.adapters.base import AdaptedModel
from fedclient.tasks.base import LocalData, Split, Task, TrainingRun
from fedcore.params import Params
from fedcore.rng import stream


class GatedLayersParams(Params):
    """The job says nothing."""


class GatedLayersOptions(Params):
    """Where the test listens, and which points are this client's."""

    gate: int = Field(ge=1, le=65535)
    points: int = Field(ge=0)


class GatedLayers(Task):
    """Points in five dimensions, four classes."""

    name = "gated-layers"
    params: GatedLayersParams
    options: GatedLayersOptions

    def load(self) -> LocalData:
        drawn = stream(self.options.points, "points").standard_normal((24, 5))
        points = Split(torch.from_numpy(drawn).float(), torch.arange(24) % 4)
        return LocalData(points, points)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def add_gradients(self, model: AdaptedModel, data: Split, run: TrainingRun, samples: int) -> int:
        self._wait()
        return super().add_gradients(model, data, run, samples)

    def train(self, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
        self._wait()
        return super().train(model, data, run)

    def _wait(self) -> None:
        with socket.create_connection(("127.0.0.1", self.options.gate)) as gate:
            gate.recv(1)
