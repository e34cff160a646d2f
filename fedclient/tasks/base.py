"""The contract of a task: what a client trains, on which data, and how it measures the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel
from fedclient.tasks import supervised
from fedcore.jobfile import TrainingSection
from fedcore.params import Params, parse_params


@dataclass(frozen=True)
class Split:
    """Examples for training or for measuring: N inputs and their N targets, along the first axis."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        """Check that inputs and targets belong together.

        Raises:
            ValueError: their numbers differ.
        """
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        """Return N."""
        return len(self.inputs)

    def to(self, device: torch.device) -> Split:
        """Return the same examples on `device`."""
        return Split(self.inputs.to(device), self.targets.to(device))

    @staticmethod
    def join(splits: Sequence[Split]) -> Split:
        """Return the examples of all `splits`, one after the other."""
        return Split(torch.cat([split.inputs for split in splits]), torch.cat([split.targets for split in splits]))


@dataclass(frozen=True)
class LocalData:
    """A client's own data.

    `held_out` is never trained on and may be empty: then the client reports no evaluation.
    """

    train: Split
    held_out: Split


@dataclass(frozen=True)
class TrainingRun:
    """One call of local training.

    Attributes:
        settings: the job's `[training]` section.
        generator: the source of every random choice (on the CPU). Torch's global generator is seeded too, for
            dropout.
        tick: call it after each step with the part done, 0 to 1; it raises when the client is to stop.
    """

    settings: TrainingSection
    generator: torch.Generator
    tick: Callable[[float], None]


class Task(ABC):
    """What a client trains. Two methods are required; the others do supervised classification by default.

    A subclass names the keys it understands by annotating `params` and `options` with its own `Params`
    classes::

        class MyTask(Task):
            params: MyParams      # [task] keys of the job file: the same on every client
            options: MyOptions    # this client's own --data KEY=VALUE: where its data lies

    Args:
        params: the job's `[task]` keys other than `name` and `data`.
        options: this client's data options; text is converted to the declared types.
        seed: the job's seed, the same on every client. Randomness in `load` must follow from it.

    Raises:
        InvalidInput: a parameter or option is unknown or out of bounds.
    """

    name: ClassVar[str]
    """What a job file writes in `[task] name`."""

    params: Params
    options: Params

    def __init__(self, params: Mapping[str, object], options: Mapping[str, str], seed: int) -> None:
        hints = get_type_hints(type(self))
        self.params = parse_params(hints["params"], params, "task")
        self.options = parse_params(hints["options"], options, "data", strict=False)
        self.seed = seed

    @abstractmethod
    def load(self) -> LocalData:
        """Return this client's data, on the CPU. Called once for a job.

        Raises:
            InvalidInput: the data cannot be found or is not what the task needs.
        """

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the model before adaptation: the same values on every client.

        Torch's global generator is seeded from the job's seed around this call, so that freshly initialised
        layers agree everywhere.
        """

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return what the model makes of N inputs, N along the first axis."""
        scores: Tensor = model(inputs)
        return scores

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch; cross-entropy of class scores unless overridden.

        Private jobs call it for one example at a time.
        """
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return figures of merit as means over the examples; accuracy and loss unless overridden."""
        accuracy = (outputs.argmax(dim=-1) == targets).double().mean().item()
        return {"accuracy": accuracy, "loss": float(self.loss(outputs, targets).item())}

    def train(self, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
        """Train `model` in place on this client's examples and return training metrics.

        The default walks `local_epochs` times through shuffled batches with the job's optimiser and `loss`. Jobs with
        mechanism ``dp-sgd`` or ``dp-lora-paper`` do not call it, but train by `outputs` and `loss`.
        """
        return supervised.train(self, model, data, run)

    def add_gradients(self, model: AdaptedModel, data: Split, run: TrainingRun, samples: int) -> int:
        """Add up the loss's gradients over at most `samples` examples, and return over how many.

        Which weights they are by is `AdaptedModel.measuring`'s business. The default takes examples at random.
        """
        return supervised.add_gradients(self, model, data, run, samples)

    def evaluate(self, model: nn.Module, data: Split) -> dict[str, float]:
        """Measure `model` on `data`, which is not empty, and return `metrics`."""
        return self.metrics(supervised.predict(model, data.inputs, self.outputs), data.targets)

    def describe(self) -> str:
        """Return Markdown on the data and model for the model card; empty if there is nothing to say."""
        return ""
