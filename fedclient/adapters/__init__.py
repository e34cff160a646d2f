"""Adapters: which of a model's weights are trained and travel.

To add one, implement `base.Adapter` and list it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.registry import Registry

if TYPE_CHECKING:
    from fedclient.adapters.base import Adapter

ADAPTERS: Registry[type[Adapter]] = Registry(
    "adapter",
    "roundtable.adapters",
    {
        "full": "fedclient.adapters.full:Full",
        "ffa-lora": "fedclient.adapters.lora:FfaLora",
        "lora": "fedclient.adapters.lora:Lora",
        "lora-sb": "fedclient.adapters.lora_sb:LoraSb",
        "rolora": "fedclient.adapters.lora:RoLora",
    },
)
