"""Aggregation rules and server optimisers: how updates become the next version. README.md is the catalogue."""

from __future__ import annotations

from typing import Final

from fedagg.base import Capacity, FactorRule, Fold, FoldRule, Merged, Rule, RuleTraits
from fedagg.optimizers.base import ServerOptimizer
from fedagg.table import OPTIMIZERS, RULES, build_optimizer, build_rule

__all__: Final = [
    "OPTIMIZERS",
    "RULES",
    "Capacity",
    "FactorRule",
    "Fold",
    "FoldRule",
    "Merged",
    "Rule",
    "RuleTraits",
    "ServerOptimizer",
    "build_optimizer",
    "build_rule",
]
