"""Which parameters of a model are trained whole: found by name, and refused where that would go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fedclient.adapters.targets import Target, names_of_parameters, shown
from fedcore.adapters import FULL_GROUP
from fedcore.errors import InvalidInput


def find_trainable(
    model: nn.Module, patterns: Sequence[str], adapted: Sequence[Target] = ()
) -> list[tuple[str, str, nn.Parameter]]:
    """Return (group, name, parameter) of what `patterns` match, in the model's order, as `AdaptedModel` takes them.

    Parameters that are no floating-point numbers, as those of quantised layers, are passed over.

    Args:
        model: not adapted yet, so that the names are its own.
        patterns: shell patterns for whole names, such as ``classifier.*``.
        adapted: the layers that an adapter is about to be put on.

    Raises:
        InvalidInput: a pattern matches nothing that can be trained, or a parameter of an adapted layer; or one that is
            used under several names, if it would be frozen under one of them or stands beside an adapter.
    """
    names_of = names_of_parameters(model)
    of_adapter = {id(parameter) for target in adapted for parameter in target.layer.parameters()}
    known = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    free = [name for name, p in known.items() if id(p) not in of_adapter and not (adapted and len(names_of[id(p)]) > 1)]
    others = f"the model has: {shown(free) or 'none'}"
    where = f"adapter.trainable {list(patterns)}: "
    if unmatched := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]:
        raise InvalidInput(f"{where}{', '.join(unmatched)} matches no parameter that can be trained; {others}")
    chosen = {name: p for name, p in known.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for name, parameter in chosen.items():
        if id(parameter) in of_adapter:
            raise InvalidInput(f"{where}{name} is of a layer that adapter.targets match; beside it {others}")
        same = names_of[id(parameter)]
        if len(same) > 1 and adapted:
            raise InvalidInput(f"{where}{name} is one weight that is used as {', '.join(same)}; beside it {others}")
        if frozen := [other for other in same if other not in chosen]:
            raise InvalidInput(f"{where}{name} is also {', '.join(frozen)}: match all of these names or none")
    return [(FULL_GROUP, name, p) for name, p in chosen.items() if names_of[id(p)][0] == name]
