"""The demo task itself."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from fedclient.tasks.base import LocalData, Split, Task
from fedclient.tasks.digits.network import load_base
from fedclient.tasks.digits.samples import MAX_SHARDS, Images, Labels, client_samples, deal
from fedclient.tasks.digits.shifts import SHIFTS, apply_shift
from fedcore.params import Params
from fedcore.rng import stream


class Partition(Params):
    """How the digits are dealt out."""

    kind: Literal["dirichlet", "even"] = "dirichlet"
    alpha: float = Field(
        default=0.5, gt=0, le=1e6, description="Of dirichlet: the smaller, the more skewed the labels."
    )


class DigitsParams(Params):
    """Keys of `[task]`."""

    partition: Partition = Partition()
    held_out: float = Field(default=0.25, ge=0, lt=1, description="Part of each shard that only measures.")


class DigitsOptions(Params):
    """This client's `--data` options."""

    shard: int = Field(ge=0, description="Which shard this client holds, from 0.")
    num_shards: int = Field(ge=1, le=MAX_SHARDS, description="Into how many the digits are dealt.")

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.shard >= self.num_shards:
            raise ValueError(f"shard {self.shard} does not exist: shards are 0 to {self.num_shards - 1}")
        return self


class Digits(Task):
    """Handwritten digits that each client sees in its own way, with labels skewed between clients."""

    name: ClassVar[str] = "digits"
    params: DigitsParams
    options: DigitsOptions

    def load(self) -> LocalData:
        """Return this client's shard."""
        return self.load_shard(self.options.shard)

    def load_shard(self, shard: int) -> LocalData:
        """Return shard `shard`: dealt, split and shifted as the job's seed says."""
        samples = client_samples()
        partition = self.params.partition
        alpha = partition.alpha if partition.kind == "dirichlet" else None
        rows = deal(samples.labels, self.options.num_shards, alpha, self.seed)[shard]
        generator = stream(self.seed, "digits", "shard", shard)
        rows = generator.permutation(rows)
        images = apply_shift(samples.images[rows], shard, generator)
        labels = samples.labels[rows]
        num_held_out = min(len(rows) - 1, int(np.ceil(len(rows) * self.params.held_out)))
        return LocalData(
            train=to_split(images[num_held_out:], labels[num_held_out:]),
            held_out=to_split(images[:num_held_out], labels[:num_held_out]),
        )

    def build_model(self) -> nn.Module:
        """Return the pre-trained base network."""
        return load_base()

    def describe(self) -> str:
        """See `Task.describe`."""
        return (
            "Data: 1197 handwritten digits of 8 × 8 pixels from scikit-learn, dealt out to the clients; each sees them"
            f" through one of {', '.join(SHIFTS)}. Base: a 64-128-128-10 network trained on 600 other, upright digits."
        )


def to_split(images: Images, labels: Labels) -> Split:
    """Return images as the network takes them, N × 64, with their labels."""
    return Split(torch.from_numpy(images.reshape(-1, 64)), torch.from_numpy(labels))
