"""The default training loop: shuffled mini-batches, one optimiser, one loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedcore.jobfile import TrainingSection

if TYPE_CHECKING:
    from fedclient.adapters.base import AdaptedModel
    from fedclient.tasks.base import Split, Task, TrainingRun

_EVALUATION_BATCH = 1024


def train(task: Task, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
    """Run `local_epochs` passes over `data` and return ``train_loss``, the mean over the last pass.

    The last batch of a pass may be smaller. The optimiser starts fresh: what it learned of gradients belongs
    to another version of the model.
    """
    settings = run.settings
    optimizer = make_optimizer(model.parameters, settings)
    model.module.train()
    num_batches = -(-len(data) // settings.batch_size)
    last_pass = 0.0
    for epoch in range(settings.local_epochs):
        order_N = torch.randperm(len(data), generator=run.generator).to(data.inputs.device)
        last_pass = 0.0
        for number, rows in enumerate(torch.split(order_N, settings.batch_size)):
            batch_loss = task.loss(task.outputs(model.module, data.inputs[rows]), data.targets[rows])
            optimizer.zero_grad()
            batch_loss.backward()  # type: ignore[no-untyped-call]
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters, settings.max_grad_norm)
            optimizer.step()
            last_pass += batch_loss.item() * len(rows) / len(data)
            run.tick((epoch * num_batches + number + 1) / (settings.local_epochs * num_batches))
    return {"train_loss": last_pass}


def add_gradients(task: Task, model: AdaptedModel, data: Split, run: TrainingRun, samples: int) -> int:
    """Add up the gradients of the summed loss over `samples` examples, or all if there are fewer; return how many.

    In evaluation mode: what a gradient is of must not depend on what dropout draws.
    """
    model.module.eval()
    order_N = torch.randperm(len(data), generator=run.generator).to(data.inputs.device)[:samples]
    done = 0
    for rows in torch.split(order_N, run.settings.batch_size):
        mean = task.loss(task.outputs(model.module, data.inputs[rows]), data.targets[rows])
        (mean * len(rows)).backward()  # type: ignore[no-untyped-call]
        done += len(rows)
        run.tick(done / len(order_N))
    return done


def make_optimizer(parameters: list[nn.Parameter], settings: TrainingSection) -> torch.optim.Optimizer:
    """Return the optimiser that a job's `[training]` section asks for."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def predict(
    model: nn.Module, inputs: Tensor, outputs: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
) -> Tensor:
    """Return the model's outputs for all inputs, in evaluation mode and without gradients."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([outputs(model, batch) for batch in torch.split(inputs, _EVALUATION_BATCH)])
