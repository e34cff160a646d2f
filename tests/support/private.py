"""Small models, examples and an independent calculation for tests of private training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedclient import dpsgd
from fedclient.adapters import ADAPTERS
from fedclient.adapters.base import AdaptedModel
from fedclient.tasks.base import LocalData, Split, Task, TrainingRun
from fedclient.tasks.digits.task import Digits
from fedcore.draws import PrivateDraws
from fedcore.jobfile import AdapterSection, TrainingSection
from fedcore.params import Params
from fedcore.sending import Sending

ADAPTER_PARAMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 4, "targets": ["hidden*"], "trainable": ["output.*"]},
    "ffa-lora": {"rank": 4, "targets": ["hidden*"]},
    "rolora": {"rank": 4, "targets": ["hidden*"]},
    "lora-sb": {"rank": 4, "targets": ["hidden*"]},
}


class NoKeys(Params):
    """Nothing to say."""


class Points(Task):
    """As many points as a test asks for, in 5 dimensions and 3 classes, and a model that it may replace."""

    name = "points"
    params: NoKeys
    options: NoKeys

    def load(self) -> LocalData:
        return LocalData(points(20), points(0))

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def points(number: int) -> Split:
    generator = torch.Generator().manual_seed(7)
    return Split(torch.randn(number, 5, generator=generator), torch.arange(number) % 3)


def points_task() -> Points:
    return Points({}, {}, 1)


def digits_task() -> Digits:
    return Digits({}, {"shard": "0", "num_shards": "5"}, 3)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return make()


def adapted(task: Task, adapter: str, params: dict[str, Any]) -> AdaptedModel:
    """Return the task's model with an adapter of which no factor is 0."""
    model = ADAPTERS.get(adapter)(params).attach(seeded(task.build_model), 1)
    section = AdapterSection.model_validate({**params, "name": adapter})
    model.train_only(Sending.of(section).layout(model.layout, "anna", 1))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        # Also what an alternating adapter does not train now.
        for parameter in [each for name, each in model.module.named_parameters() if "lora_" in name]:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def run_of(ticks: list[float] | None = None, **keys: Any) -> TrainingRun:
    settings = TrainingSection(**{"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 8, **keys})
    tick = (lambda _: None) if ticks is None else ticks.append
    return TrainingRun(settings, torch.Generator().manual_seed(1), tick)


def draws_of(secret: int = 1) -> PrivateDraws:
    return PrivateDraws(secret.to_bytes(32, "little"), b"test")


def one_by_one(task: Task, model: AdaptedModel, data: Split) -> Tensor:
    """Return each example's gradient by all that is trained, N × D, from a backward pass of its own."""
    rows = []
    model.module.train()
    for row in range(len(data)):
        single = slice(row, row + 1)
        loss = task.loss(task.outputs(model.module, data.inputs[single]), data.targets[single])
        rows.append(flat(torch.autograd.grad(loss, model.parameters)))
    return torch.stack(rows)


@contextmanager
def kept(model: AdaptedModel) -> Iterator[None]:
    """Put back what is trained."""
    before = [parameter.detach().clone() for parameter in model.parameters]
    yield
    with torch.no_grad():
        for parameter, value in zip(model.parameters, before, strict=True):
            parameter.copy_(value)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def step_of(
    task: Task,
    model: AdaptedModel,
    data: Split,
    clip: float,
    batch_size: int = 8,
    sampling: float = 1.0,
    noise_multiplier: float = 0.0,
) -> Tensor:
    """Return what one step of plain SGD of rate 1 subtracted, times what its sum was divided by: D, in float64."""
    before, run = flat(model.parameters), run_of(batch_size=batch_size, learning_rate=1.0)
    how = {"sampling": sampling, "clip": clip, "noise_multiplier": noise_multiplier}
    with kept(model):
        dpsgd.train(task, model, data, run, draws_of(), steps=1, **how)
        sum_D: Tensor = (before - flat(model.parameters)) * len(data) * sampling
    return sum_D


def expected_sum(examples_ND: Tensor, clip: float) -> Tensor:
    """Return the sum of what is left of each row when it is clipped."""
    norms_N = torch.linalg.vector_norm(examples_ND, dim=1)
    kept_ND: Tensor = examples_ND * (clip / norms_N.clamp(min=clip))[:, None]
    return kept_ND.sum(dim=0)
