"""A task of your own: one class in one file. Here: is a tumour benign? Each hospital keeps its patients' figures."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from sklearn.datasets import load_breast_cancer
from torch import nn

from fedclient.tasks.base import LocalData, Split, Task
from fedcore.params import Params


class JobKeys(Params):
    """What a job file may say in `[task]`."""

    hidden: int = Field(default=16, ge=1, le=1024)


class DataOptions(Params):
    """What this client's owner says with `--data shard=0 --data num_shards=3`."""

    shard: int = Field(default=0, ge=0, lt=100)
    num_shards: int = Field(default=1, ge=1, le=100)


class BreastCancer(Task):
    """569 patients, 30 figures each, two classes."""

    name = "breast-cancer"
    params: JobKeys
    options: DataOptions

    def load(self) -> LocalData:
        """Take every num_shards-th patient; a fifth of them only measures."""
        features, classes = load_breast_cancer(return_X_y=True)
        mine = slice(self.options.shard, None, self.options.num_shards)
        features, classes = features[mine], classes[mine]
        features = (features - features.mean(axis=0)) / features.std(axis=0)
        inputs, targets = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(classes)
        num_held_out = len(inputs) // 5
        return LocalData(
            train=Split(inputs[num_held_out:], targets[num_held_out:]),
            held_out=Split(inputs[:num_held_out], targets[:num_held_out]),
        )

    def build_model(self) -> nn.Module:
        """Return a small network; its initial weights follow from the job's seed on every client."""
        hidden = self.params.hidden
        return nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2))
