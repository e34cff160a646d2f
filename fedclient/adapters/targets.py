"""Which layers of a model an adapter is put on: found by pattern, and refused where that would go wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from fedcore.errors import InvalidInput

MAX_SHOWN: Final = 20
"""Layers that an error names."""


@dataclass(frozen=True)
class Target:
    """A layer that computes W x + b, with W of `num_outputs` × `num_inputs`, and its path in the model."""

    path: str
    layer: nn.Module
    num_outputs: int
    num_inputs: int
    is_transposed: bool = False
    """Whether the weight lies as inputs × outputs."""


def find_targets(model: nn.Module, patterns: Sequence[str], rank: int) -> list[Target]:
    """Return the linear layers whose path, or the last part of it, matches one of `patterns`, in the model's order.

    Linear are `nn.Linear`, the `Conv1D` of transformers, whose weight lies transposed, and the quantised layers of
    bitsandbytes. No other subclass: it may not call forward at all (nn.MultiheadAttention reads its weight).

    Args:
        model: not adapted yet.
        patterns: shell patterns.
        rank: of the update that each layer is to have.

    Raises:
        InvalidInput: a pattern matches no such layer, `rank` is above min(outputs, inputs) of one, or one shares its
            weight with another part of the model, which merging would change unasked.
    """
    linears = [target for target in map(_as_target, *zip(*model.named_modules(), strict=True)) if target]
    unmatched = [pattern for pattern in patterns if not any(_matches(target.path, pattern) for target in linears)]
    if unmatched:
        raise InvalidInput(
            f"adapter.targets {list(unmatched)}: match no linear layer; the model has: {_shown(linears)}"
        )
    chosen = [target for target in linears if any(_matches(target.path, pattern) for pattern in patterns)]
    owners = names_of_parameters(model)
    tied = [target for target in chosen if len(owners[id(target.layer.weight)]) > 1]
    if tied:
        shared = ", ".join(owners[id(tied[0].layer.weight)])
        raise InvalidInput(
            f"adapter.targets {list(patterns)}: match {tied[0].path}, one weight that is used as {shared}; name others"
            f" of: {_shown([target for target in linears if target not in tied])}"
        )
    for target in chosen:
        if rank > (bound := min(target.num_outputs, target.num_inputs)):
            raise InvalidInput(
                f"adapter.rank {rank}: above {bound}, the most that {target.path} with {target.num_outputs} outputs and"
                f" {target.num_inputs} inputs can have; lower it, or name larger layers in adapter.targets:"
                f" {_shown([target for target in linears if min(target.num_outputs, target.num_inputs) >= rank])}"
            )
    return chosen


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where `path` leads."""
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _as_target(path: str, layer: Any) -> Target | None:
    # By name: neither package is imported for a model that does without.
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not path:
        return None
    if kind == "transformers.pytorch_utils.Conv1D":
        return Target(path, layer, layer.weight.shape[1], layer.weight.shape[0], is_transposed=True)
    if type(layer) is nn.Linear or kind in {
        "bitsandbytes.nn.modules.Linear4bit",
        "bitsandbytes.nn.modules.Linear8bitLt",
    }:
        return Target(path, layer, layer.out_features, layer.in_features)
    return None


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path.rpartition(".")[2], pattern)


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return the id of each parameter with every path that it is used under."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _shown(linears: Sequence[Target]) -> str:
    return shown(target.path for target in linears) or "none inside another module"


def shown(paths: Iterable[str]) -> str:
    """Return patterns that match `paths`, at most `MAX_SHOWN`; the numbers of blocks are stars."""
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?=\.)", "*", path) for path in paths))
    more = f" and {len(patterns) - MAX_SHOWN} more" if len(patterns) > MAX_SHOWN else ""
    return ", ".join(patterns[:MAX_SHOWN]) + more
