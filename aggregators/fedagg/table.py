"""The visible tables of rules and server optimisers. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from fedagg.base import Rule
from fedagg.optimizers.base import ServerOptimizer
from fedcore.registry import Registry

RULES: Final[Registry[type[Rule]]] = Registry(
    kind="aggregation rule",
    group="roundtable.aggregators",
    builtins={
        "fedex-lora": "fedagg.lowrank.rules:FedEx",
        "flexlora": "fedagg.lowrank.rules:FlexLora",
        "flora": "fedagg.lowrank.rules:Flora",
        "hetlora": "fedagg.lowrank.rules:HetLora",
        "lora-fair": "fedagg.lowrank.rules:LoraFair",
        "weighted-mean": "fedagg.weighted_mean:WeightedMean",
    },
)

OPTIMIZERS: Final[Registry[type[ServerOptimizer]]] = Registry(
    kind="server optimiser",
    group="roundtable.server_optimizers",
    builtins={
        "adagrad": "fedagg.optimizers.adagrad:Adagrad",
        "adam": "fedagg.optimizers.adam:Adam",
        "momentum": "fedagg.optimizers.momentum:Momentum",
        "none": "fedagg.optimizers.none:NoOptimizer",
        "yogi": "fedagg.optimizers.yogi:Yogi",
    },
)


def build_rule(name: str, params: Mapping[str, JsonValue]) -> Rule:
    """Return the rule called `name` with these parameters.

    Raises:
        UnknownPlugin: there is none; the text names the known ones.
        InvalidInput: a parameter is unknown, missing or out of bounds.
    """
    return RULES.get(name).configure(params)


def build_optimizer(name: str, params: Mapping[str, JsonValue]) -> ServerOptimizer:
    """Return the server optimiser called `name` with these parameters.

    Raises:
        UnknownPlugin: there is none; the text names the known ones.
        InvalidInput: a parameter is unknown, missing or out of bounds.
    """
    return OPTIMIZERS.get(name).configure(params)
