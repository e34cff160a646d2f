"""Trains the base network: `python -m fedclient.tasks.digits.pretrain [FILE]`.

The result is committed as `base.safetensors`; running this again on the same version of torch gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fedclient.tasks.digits.network import BASE_WEIGHTS, make_network
from fedclient.tasks.digits.samples import base_samples, client_samples
from fedclient.tasks.digits.task import to_split
from fedclient.tasks.supervised import predict

SEED = 7
EPOCHS = 60
BATCH_SIZE = 32
LEARNING_RATE = 2e-3


def pretrain() -> nn.Module:
    """Return the base network, trained on the 600 upright base samples."""
    data = base_samples()
    split = to_split(data.images, data.labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        network = make_network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        network.train()
        for _ in range(EPOCHS):
            for rows in torch.split(torch.randperm(len(split)), BATCH_SIZE):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(split.inputs[rows]), split.targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return network


def upright_accuracy(network: nn.Module) -> float:
    """Return the accuracy on the 1197 samples of the clients, upright and clean, none of them seen in training."""
    data = client_samples()
    split = to_split(data.images, data.labels)
    return float((predict(network, split.inputs).argmax(dim=1) == split.targets).double().mean())


def main() -> None:
    """Train, write the file, print the accuracy."""
    parser = argparse.ArgumentParser(description="Train the base network of the digits demo.")
    parser.add_argument("file", type=Path, nargs="?", default=BASE_WEIGHTS, help="where to write the weights")
    file: Path = parser.parse_args().file
    torch.set_num_threads(1)
    network = pretrain()
    save_file(network.state_dict(), file)
    sys.stdout.write(f"{file}: accuracy {upright_accuracy(network):.4f} on unseen upright digits\n")


if __name__ == "__main__":
    main()
