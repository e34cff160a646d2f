"""The base network: 64-128-128-10, trained once on upright digits (`pretrain.py`)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Final

from safetensors.torch import load_file
from torch import nn

BASE_WEIGHTS: Final = Path(__file__).with_name("base.safetensors")


def make_network() -> nn.Module:
    """Return the network with fresh weights; it takes N × 64 pixels and returns N × 10 class scores."""
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(64, 128),
            act1=nn.ReLU(),
            hidden2=nn.Linear(128, 128),
            act2=nn.ReLU(),
            output=nn.Linear(128, 10),
        )
    )


def load_base() -> nn.Module:
    """Return the network with the weights that lie beside this file."""
    network = make_network()
    network.load_state_dict(load_file(BASE_WEIGHTS))
    return network
