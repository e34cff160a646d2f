"""What the tasks on Hugging Face models have in common: parameters, data, training, evaluation.

Shape legend: N examples, T tokens, C scores.
"""

from __future__ import annotations

import logging
import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from fedclient.adapters.base import AdaptedModel
from fedclient.device import supports_bf16
from fedclient.tasks.base import LocalData, Split, Task, TrainingRun
from fedclient.tasks.hf.encoding import Example, as_batch, lengths_of, to_split
from fedclient.tasks.hf.models import Head, Quantisation, load_model, load_tokenizer, locate
from fedclient.tasks.hf.rows import Row, read_dataset, read_files
from fedclient.tasks.partition import Partition, Rows, deal_by_value, deal_dirichlet, deal_evenly
from fedclient.tasks.supervised import make_optimizer
from fedcore.errors import ConfigError, FedError, InvalidInput
from fedcore.params import Params
from fedcore.rng import stream

EVALUATION_VALUES: Final = 1 << 24
"""Scores, or hidden values of one layer, that an evaluation holds at a time: 64 MiB in float32."""

_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)

_log: Final = logging.getLogger(__name__)


class OutOfMemory(FedError):
    """The device cannot hold the model, its gradients and a batch."""

    code = "out-of-memory"


class HfParams(Params):
    """Keys of `[task]` that both tasks have."""

    model: str = Field(description="The model's name, as on a hub: NAME or OWNER/NAME. Where it lies, a client says.")
    revision: str | None = Field(default=None, pattern=r"^[\w.-]{1,100}$", description="Of a model from the hub.")
    text: str = Field(
        default="{text}", min_length=1, max_length=10_000, description="Template: {column} is the row's value."
    )
    max_length: int = Field(default=512, ge=2, le=1 << 20, description="Tokens of an example at most.")
    gradient_accumulation: int = Field(
        default=1, ge=1, le=1_000_000, description="Parts that a step's batch is worked through in, to save memory."
    )
    bf16: bool = Field(default=False, description="Weights of the base in bfloat16.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them."
    )
    quantisation: Quantisation = Field(default="none", description="Of the base; 4bit needs CUDA and bitsandbytes.")
    partition: Partition = Field(default=Partition(), description="How rows are dealt to shards.")

    @field_validator("model")
    @classmethod
    def _names_no_place(cls, value: str) -> str:
        if not _MODEL_NAME.fullmatch(value):
            raise ValueError(
                "a job names a model as NAME or OWNER/NAME; where it lies, each client says with --data model=PATH"
            )
        return value


class HfOptions(Params):
    """This client's `--data` options."""

    model: Path | None = Field(default=None, description="Folder of the model, whatever the job calls it.")
    download: bool = Field(default=False, description="Whether models that jobs name may be fetched from the hub.")
    path: Path | None = Field(default=None, description="File or folder of files: JSONL, CSV, Parquet.")
    dataset: str | None = Field(default=None, description="Or a data set that the package datasets finds.")
    config: str | None = Field(default=None, description="Its configuration.")
    split: str = Field(default="train", description="Its split.")
    shard: int | None = Field(default=None, ge=0, description="Which shard of the rows is this client's, from 0.")
    num_shards: int | None = Field(default=None, ge=1, le=1_000_000, description="Into how many they are dealt.")
    held_out: float = Field(default=0.1, ge=0, lt=1, description="Part of this client's rows that only measures.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("say where the rows are: either path or dataset")
        if (self.shard is None) != (self.num_shards is None):
            raise ValueError("shard and num_shards go together")
        if self.shard is not None and self.num_shards is not None and self.shard >= self.num_shards:
            raise ValueError(f"shard {self.shard} does not exist: shards are 0 to {self.num_shards - 1}")
        return self


class HfTask(Task):
    """A transformer, and rows of text.

    A step's batch is worked through in `gradient_accumulation` parts of much the same size; their gradients add up to
    that of the whole batch. Metrics are means over what is predicted: tokens, or texts.
    """

    head: ClassVar[Head]
    params: HfParams
    options: HfOptions

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that each row must have."""

    @abstractmethod
    def examples(self, tokenizer: Any, row: Row) -> Iterator[Example]:
        """Yield the examples of a row; none if nothing in it can be learned."""

    @abstractmethod
    def align(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (N × C, float32) and what they should have predicted (N)."""

    @property
    def model_config(self) -> dict[str, Any]:
        """What is set in the model's configuration."""
        return {}

    def load(self) -> LocalData:
        """Return this client's shard; whole rows are held out, so that no text is on both sides."""
        tokenizer = load_tokenizer(self._folder())
        rows = self._own_rows()
        shuffled = stream(self.seed, "hf", "held-out", self.options.shard or 0).permutation(len(rows))
        num_held_out = min(len(rows) - 1, math.ceil(len(rows) * self.options.held_out))
        held_out, train = [
            [example for index in part for example in self.examples(tokenizer, rows[index])]
            for part in (shuffled[:num_held_out], shuffled[num_held_out:])
        ]
        if not train:
            raise InvalidInput(f"{len(rows)} rows, {num_held_out} of them held out, leave nothing to train on")
        return LocalData(self._to_split(train), self._to_split(held_out))

    def build_model(self) -> nn.Module:
        """Return the model in training precision; see `load_model`."""
        params = self.params
        folder = self._folder()
        model = load_model(folder, self.head, bf16=params.bf16, quantisation=params.quantisation, **self.model_config)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and params.max_length > limit:
            raise InvalidInput(f"task.max_length {params.max_length}: {params.model} takes at most {limit} tokens")
        if model.config.pad_token_id is None:
            # A classifier without a token for classes looks for the last one that is no padding.
            tokenizer = load_tokenizer(folder)
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            model.config.pad_token_id = 0 if pad is None else pad
        if params.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        module: nn.Module = model
        return module

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the scores of each place, or of each text.

        Raises:
            ConfigError: the device does not compute in bfloat16, and the job says so.
        """
        self._check_device(inputs.device)
        config: Any = model.config
        scores: Tensor = model(**as_batch(inputs, config.pad_token_id)).logits
        return scores

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over what is to be predicted."""
        return nn.functional.cross_entropy(*self.align(outputs, targets))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return accuracy and loss over what is to be predicted."""
        scores, wanted = self.align(outputs, targets)
        accuracy = (scores.argmax(dim=-1) == wanted).double().mean().item()
        return {"accuracy": accuracy, "loss": nn.functional.cross_entropy(scores, wanted).item()}

    def train(self, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
        """See `Task.train`.

        Raises:
            OutOfMemory: with advice.
            ConfigError: as for `outputs`.
        """
        with self._advising(f"a step of {run.settings.batch_size} examples"):
            return self._train(model, data, run)

    def add_gradients(self, model: AdaptedModel, data: Split, run: TrainingRun, samples: int) -> int:
        """See `Task.add_gradients`: a batch counts as its mean loss times its examples; raises like `train`."""
        model.module.eval()
        order_N = torch.randperm(len(data), generator=run.generator).to(data.inputs.device)[:samples]
        done = 0
        with self._advising(f"gradients of {run.settings.batch_size} examples"):
            for rows in torch.split(order_N, run.settings.batch_size):
                self._add_gradients(model.module, data, rows, float(len(rows)))
                done += len(rows)
                run.tick(done / len(order_N))
        return done

    def evaluate(self, model: nn.Module, data: Split) -> dict[str, float]:
        """Return the metrics as means over all that is to be predicted; raises like `train`."""
        totals: dict[str, float] = {}
        model.eval()
        config: Any = model.config
        width = config.vocab_size if self.head == "causal-lm" else 4 * config.hidden_size
        with self._advising("evaluation"), torch.inference_mode():
            for rows in _bounded(lengths_of(data.inputs), EVALUATION_VALUES // width):
                targets = data.targets[rows]
                weight = self._num_predicted(targets)
                for name, value in self.metrics(self.outputs(model, data.inputs[rows]), targets).items():
                    totals[name] = totals.get(name, 0.0) + value * weight
        total = self._num_predicted(data.targets)
        return {name: value / total for name, value in totals.items()}

    def describe(self) -> str:
        """See `Task.describe`."""
        return f"Base: {self.params.model}. Examples of at most {self.params.max_length} tokens."

    def _train(self, model: AdaptedModel, data: Split, run: TrainingRun) -> dict[str, float]:
        settings = run.settings
        optimizer = make_optimizer(model.parameters, settings)
        model.module.train()
        num_steps = settings.local_epochs * -(-len(data) // settings.batch_size)
        step, summed, predicted = 0, 0.0, 0
        for _ in range(settings.local_epochs):
            summed, predicted = 0.0, 0
            order_N = torch.randperm(len(data), generator=run.generator).to(data.inputs.device)
            for rows in torch.split(order_N, settings.batch_size):
                optimizer.zero_grad()
                summed += self._add_gradients(model.module, data, rows, 1.0)
                predicted += self._num_predicted(data.targets[rows])
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters, settings.max_grad_norm)
                optimizer.step()
                step += 1
                run.tick(step / num_steps)
        return {"train_loss": summed / predicted}

    def _add_gradients(self, model: nn.Module, data: Split, rows: Tensor, scale: float) -> float:
        """Add the gradient of `scale` times the mean loss of `rows`, part by part; return the loss as a sum."""
        num_predicted, summed = self._num_predicted(data.targets[rows]), 0.0
        for part in torch.chunk(rows, self.params.gradient_accumulation):
            targets = data.targets[part]
            loss = self.loss(self.outputs(model, data.inputs[part]), targets) * self._num_predicted(targets)
            (loss * (scale / num_predicted)).backward()  # type: ignore[no-untyped-call]
            summed += loss.item()
        return summed

    def _own_rows(self) -> Sequence[Row]:
        options, partition = self.options, self.params.partition
        columns = list(dict.fromkeys([*self.columns, *([partition.column] if partition.column else [])]))
        files = (
            read_files(options.path, columns)
            if options.path is not None
            else [read_dataset(str(options.dataset), options.config, options.split, columns)]
        )
        rows = [row for file in files for row in file]
        if not rows:
            raise InvalidInput(f"{options.path or options.dataset}: holds no rows")
        if options.shard is None or options.num_shards is None:
            return rows
        if partition.kind == "files":
            if len(files) < options.num_shards:
                raise InvalidInput(f"{options.path}: {len(files)} files are too few for {options.num_shards} shards")
            return [row for file in files[options.shard :: options.num_shards] for row in file]
        return [rows[index] for index in self._deal(rows, options.num_shards)[options.shard]]

    def _deal(self, rows: Sequence[Row], num_shards: int) -> list[Rows]:
        partition = self.params.partition
        generator = stream(self.seed, "hf", "partition")
        if partition.column is None:
            return deal_evenly(len(rows), num_shards, generator)
        values_N = [row[partition.column] for row in rows]
        if partition.kind == "dirichlet":
            return deal_dirichlet(values_N, num_shards, partition.alpha, generator)
        return deal_by_value(values_N, num_shards)

    def _to_split(self, examples: Sequence[Example]) -> Split:
        return to_split(examples, self.params.max_length, has_class=self.head == "sequence-classification")

    def _num_predicted(self, targets: Tensor) -> int:
        """Return how many targets `align` leaves."""
        return len(targets)

    def _folder(self) -> Path:
        params, options = self.params, self.options
        return locate(params.model, params.revision, options.model, download=options.download)

    def _check_device(self, device: torch.device) -> None:
        if self.params.bf16 and not supports_bf16(device):
            raise ConfigError(f"task.bf16: {device} does not compute in bfloat16; leave it out, or use another device")
        if self.params.quantisation != "none" and device.type != "cuda":
            raise ConfigError(f"task.quantisation {self.params.quantisation!r}: needs a CUDA device, this is {device}")

    @contextmanager
    def _advising(self, what: str) -> Iterator[None]:
        """Turn an allocation that failed into advice."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            params = self.params
            raise OutOfMemory(
                f"out of memory in {what} of at most {params.max_length} tokens: what saves memory is"
                f" task.gradient_accumulation above {params.gradient_accumulation} or a smaller training.batch_size,"
                + ("" if params.gradient_checkpointing else " task.gradient_checkpointing = true,")
                + ("" if params.bf16 else " task.bf16 = true,")
                + " a shorter task.max_length"
            ) from error


def _bounded(lengths_N: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Yield all rows in batches of at most `max_tokens` tokens, padding counted; at least one row each."""
    order = lengths_N.argsort(stable=True)
    start = 0
    for end, length in enumerate(lengths_N[order].tolist()):
        if end > start and (end + 1 - start) * length > max_tokens:
            yield order[start:end]
            start = end
    yield order[start:]
