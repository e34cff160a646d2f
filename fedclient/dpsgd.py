"""Training that hides each example: DP-SGD (Abadi et al., Deep Learning with Differential Privacy, 2016).

The number of examples is taken to be known. An example changes what a step adds up by at most `clip`, if its loss does
not depend on the others of its batch; what breaks that, as far as it can be seen, is refused. Errors go to the
operator, so they hold no figures of the data.

Shape legend: N examples of this client, B of them in a batch, worked through M at a time.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedclient.adapters.base import AdaptedModel
from fedclient.clipping import CannotHide, clipped, noised
from fedclient.tasks.base import Split, Task, TrainingRun
from fedclient.tasks.supervised import make_optimizer
from fedcore.draws import PrivateDraws
from fedcore.layout import Vector

_log: Final = logging.getLogger(__name__)

# What it sets on modules and parameters.
_OF_OPACUS: Final = (
    "grad_sample",
    "_forward_counter",
    "_current_grad_sample",
    "activations",
    "max_batch_len",
    "ft_compute_sample_grad",
)
_ADVICE: Final = (
    "train an adapter or other parameters (adapter.trainable) without task.gradient_checkpointing,"
    " or set training.batch_size = 1: slow, and right for every model"
)


def train(
    task: Task,
    model: AdaptedModel,
    data: Split,
    run: TrainingRun,
    draws: PrivateDraws,
    *,
    sampling: float,
    steps: int,
    clip: float,
    noise_multiplier: float,
) -> None:
    """Train in place, by steps on batches in which each example is with probability `sampling`.

    A step is the examples' gradients by all that is trained, each clipped as one vector to L2 norm `clip` and zero if
    it is not finite, summed, plus noise of standard deviation `noise_multiplier` · `clip` for each value, divided by
    the number of examples that is expected, N · `sampling`. `training.batch_size` is how many examples are worked
    through at once.

    With ``clip = math.inf`` and no noise it is plain training on the same batches.

    Raises:
        CannotHide: opacus is not installed, there is no data, or gradients of single examples of this model cannot be
            told apart.
    """
    if not len(data):
        raise CannotHide("there are no training examples")
    settings, parameters = run.settings, model.parameters
    optimizer = make_optimizer(parameters, settings)
    model.module.train()
    sums = _Sums(task, model, data, settings.batch_size)
    with _telling_apart(sums) if math.isfinite(clip) else nullcontext():
        for step in range(steps):
            rows_B = poisson(draws, len(data), sampling).to(data.inputs.device)
            totals = sums.clipped(rows_B, clip) if math.isfinite(clip) else sums.plain(rows_B)
            for parameter, total in zip(parameters, totals, strict=True):
                noisy = total
                if noise_multiplier:
                    noise = noise_multiplier * clip * draws.standard_normal(total.numel())
                    noisy = total + torch.from_numpy(noise).to(total.device).reshape(total.shape)
                parameter.grad = (noisy / (len(data) * sampling)).to(parameter.dtype)
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.tick((step + 1) / steps)


def train_as_published(
    task: Task,
    model: AdaptedModel,
    data: Split,
    run: TrainingRun,
    draws: PrivateDraws,
    *,
    clip: float,
    noise_multiplier: float,
) -> None:
    """Train in place by one step, as DP-LoRA was published (Liu et al., 2023).

    The gradient of the mean loss of one batch of `training.batch_size` examples, or all if there are fewer, is clipped
    as one vector, and noise of standard deviation `noise_multiplier` · `clip` is added. This hides the client as a
    whole; the batch being drawn hides nothing more.

    Raises:
        CannotHide: there is no data.
    """
    if not len(data):
        raise CannotHide("there are no training examples")
    settings, parameters = run.settings, model.parameters
    optimizer = make_optimizer(parameters, settings)
    optimizer.zero_grad()
    model.module.train()
    drawn = np.argsort(draws.random(len(data)), kind="stable")[: settings.batch_size]
    rows_B = torch.from_numpy(drawn).to(data.inputs.device)
    task.loss(task.outputs(model.module, data.inputs[rows_B]), data.targets[rows_B]).backward()  # type: ignore[no-untyped-call]
    flat_D = np.concatenate([_gradient_of(p).to("cpu", torch.float32).numpy().ravel() for p in parameters])
    noisy_D = torch.from_numpy(noised(clipped(flat_D, clip), noise_multiplier * clip, draws))
    for parameter, part in zip(parameters, torch.split(noisy_D, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.reshape(parameter.shape).to(parameter)
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    run.tick(1.0)


def start(
    task: Task,
    model: AdaptedModel,
    data: Split,
    run: TrainingRun,
    draws: PrivateDraws,
    *,
    sampling: float,
    clip: float,
    noise_multiplier: float,
) -> Vector:
    """Return the noisy sum of the examples' gradients by the adapted weights, in the order of `AdaptedModel.measuring`.

    Each example is used with probability `sampling`, and its gradient clipped to `clip` as one vector.
    """
    rows_B = poisson(draws, len(data), sampling).to(data.inputs.device)
    single = TrainingRun(run.settings, run.generator, lambda _: None)
    with model.measuring() as found:
        total = np.zeros(found().size)
        for number, row in enumerate(rows_B):
            run.tick(number / len(rows_B))
            found()[:] = 0
            task.add_gradients(model, Split(data.inputs[row, None], data.targets[row, None]), single, 1)
            total += clipped(found(), clip)
    noisy: Vector = (total + noise_multiplier * clip * draws.standard_normal(total.size)).astype(np.float32)
    return noisy


def poisson(draws: PrivateDraws, number: int, sampling: float) -> Tensor:
    """Return the rows of a batch, ascending: each of `number` is in it with probability `sampling`."""
    return torch.from_numpy(np.flatnonzero(draws.random(number) < sampling))


def clip_examples(gradients: list[Tensor], clip: float) -> list[Tensor]:
    """Scale each example's gradient to L2 norm `clip` where it is longer; one that is not finite becomes zero.

    Args:
        gradients: for each parameter M × its shape. Of an example all of them together are one vector.
        clip: the largest norm.

    Returns:
        The same in float32. Norms are taken in float64.
    """
    flat = [gradient.reshape(len(gradient), -1).float() for gradient in gradients]
    norms = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in flat]
    norm_M = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_M1 = (clip / norm_M.clamp(min=clip)).float()[:, None]
    is_finite_M1 = norm_M.isfinite()[:, None]
    return [
        torch.where(is_finite_M1, each * scale_M1, 0.0).reshape(gradient.shape)
        for each, gradient in zip(flat, gradients, strict=True)
    ]


class _Sums:
    """Gradients by all that is trained, summed over the examples of a batch."""

    def __init__(self, task: Task, model: AdaptedModel, data: Split, at_once: int) -> None:
        self.task, self.model, self.data, self.at_once = task, model, data, at_once

    def plain(self, rows_B: Tensor) -> list[Tensor]:
        """Return sums of gradients as they are, in the parameters' types."""
        self._clear()
        for rows_M in self._parts(rows_B):
            self._backward(rows_M)
        return [_gradient_of(parameter) for parameter in self.model.parameters]

    def clipped(self, rows_B: Tensor, clip: float) -> list[Tensor]:
        """Return sums of clipped gradients, in float64."""
        totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self.model.parameters]
        for rows_M in self._parts(rows_B):
            for total, each in zip(totals, clip_examples(self.of_examples(rows_M), clip), strict=True):
                total.add_(each.sum(dim=0, dtype=torch.float64))
        return totals

    def of_examples(self, rows_M: Tensor) -> list[Tensor]:
        """Return for each parameter the examples' gradients, M × its shape.

        Raises:
            CannotHide: they cannot be told apart.
        """
        self._clear()
        self._backward(rows_M)
        if self.at_once == 1:
            return [_gradient_of(parameter)[None] for parameter in self.model.parameters]
        found: list[Tensor] = []
        for parameter in self.model.parameters:
            each = getattr(parameter, "grad_sample", None)
            if parameter.grad is None:
                each = torch.zeros(len(rows_M), *parameter.shape, device=parameter.device)
            if not isinstance(each, Tensor) or each.shape != (len(rows_M), *parameter.shape):
                raise CannotHide(
                    f"{self._name_of(parameter)}: gradients of single examples cannot be told apart; {_ADVICE}"
                )
            found.append(each)
        return found

    def check_independence(self) -> None:
        """Refuse a model or a loss that is seen to mix the examples of a batch.

        Raises:
            CannotHide: batch normalisation, or an example's loss is another beside the last example than alone.
        """
        for name, module in self.model.module.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise CannotHide(
                    f"{name or 'the model'}: {type(module).__name__} mixes the examples of a batch, and then none can"
                    " be hidden; take a model with layer or group normalisation"
                )
        if self.at_once == 1:
            return
        first = torch.zeros(1, dtype=torch.int64, device=self.data.inputs.device)
        self.model.module.eval()
        with torch.no_grad():
            alone, beside = (
                float(self._losses(rows)[0]) for rows in (first, torch.cat([first, first + len(self.data) - 1]))
            )
        self.model.module.train()
        if math.isfinite(alone) and not math.isclose(alone, beside, rel_tol=2e-2, abs_tol=1e-3):
            raise CannotHide(
                "an example's loss beside another is not what it is alone: the model or the loss mixes the examples of"
                " a batch, and then none can be hidden; with training.batch_size = 1 each is alone"
            )

    def check_gradients(self) -> None:
        """Try gradients of single examples on one and on two.

        Raises:
            CannotHide: they are not there or not right.
        """
        # The same example twice is as long as it is once, so that the axis of examples is the one that changes.
        first = torch.zeros(1, dtype=torch.int64, device=self.data.inputs.device)
        for rows_M in (first, first.repeat(2)):
            for parameter, each in zip(self.model.parameters, self.of_examples(rows_M), strict=True):
                whole = _gradient_of(parameter)
                room = 1e-2 * float(whole.abs().max())
                if whole.isfinite().all() and not torch.allclose(each.sum(dim=0), whole, rtol=1e-2, atol=room):
                    raise CannotHide(
                        f"{self._name_of(parameter)}: gradients of single examples do not add up to that of their"
                        f" batch; {_ADVICE}"
                    )

    def _backward(self, rows_M: Tensor) -> None:
        torch.stack(self._losses(rows_M)).sum().backward()  # type: ignore[no-untyped-call]

    def _losses(self, rows_M: Tensor) -> list[Tensor]:
        outputs = self.task.outputs(self.model.module, self.data.inputs[rows_M])
        if len(outputs) != len(rows_M):
            raise CannotHide("the model does not give one output for each example, along the first axis")
        # Split, not indexed: the gradient of an index is as large as all outputs.
        singles = zip(torch.split(outputs, 1), torch.split(self.data.targets[rows_M], 1), strict=True)
        return [self.task.loss(output, target) for output, target in singles]

    def _parts(self, rows_B: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows_B, self.at_once) if len(rows_B) else ()

    def _clear(self) -> None:
        for parameter in self.model.parameters:
            parameter.grad = None
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None

    def _name_of(self, parameter: nn.Parameter) -> str:
        return next(name for name, each in self.model.module.named_parameters() if each is parameter)


@contextmanager
def _telling_apart(sums: _Sums) -> Iterator[None]:
    """Let backward passes give gradients of single examples within the block, and leave no trace of it.

    Raises:
        CannotHide: opacus is not installed, the model or the loss is not made for it.
    """
    sums.check_independence()
    if sums.at_once == 1:
        yield
        return
    if find_spec("opacus") is None:
        raise CannotHide(
            "privacy.mechanism 'dp-sgd': gradients of single examples need opacus: pip install 'roundtable[privacy]'"
        )
    from opacus.grad_sample import GradSampleModule

    module = sums.model.module
    try:
        with warnings.catch_warnings():
            # The first layer's inputs are data. Its gradients are right.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            with _advising():
                GradSampleModule(module, loss_reduction="sum", strict=False)
                sums.check_gradients()
            yield
    finally:
        for hook in vars(module).pop("autograd_grad_sample_hooks", ()):
            hook.remove()
        for each in [*module.parameters(), *module.modules()]:
            for name in _OF_OPACUS:
                vars(each).pop(name, None)


@contextmanager
def _advising() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _log.exception("gradients of single examples cannot be computed")
        raise CannotHide(f"gradients of single examples cannot be computed, the log says why; {_ADVICE}") from error


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return its gradient; zeros if what was computed does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
