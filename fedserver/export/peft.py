"""An adapter's folder as the `peft` package reads it: low-rank updates, and beside them modules that are saved whole.

What is trained whole is stored under the name that it has in the model, behind `base_model.model.`, and its module is
named in `modules_to_save`. Of such a module peft wants every tensor, and it takes every module whose path *ends* like
the name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedcore.adapters import PEFT_PREFIX
from fedcore.errors import InvalidInput
from fedcore.layout import TensorSpec, Vector
from fedserver.export.factors import Update
from fedserver.export.stored import Base, prefix_of
from fedserver.export.weights import Entry, entry_of


def peft_config(updates: Mapping[str, Update], dropout: float, saved: Sequence[str] = ()) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    The adapted modules are named by a regular expression of their full paths. In a list, peft would also take
    `block.0` for `0`. Patterns of ranks are matched against the end of a path too, so they begin with ``^``.

    Args:
        updates: by the paths of the adapted modules; at least one.
        dropout: of the job.
        saved: paths of the modules that are saved whole.
    """
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    alpha = Counter(update.alpha for update in updates.values()).most_common(1)[0][0]
    ranks = {f"^{re.escape(path)}": update.rank for path, update in updates.items() if update.rank != rank}
    alphas = {f"^{re.escape(path)}": update.alpha for path, update in updates.items() if update.alpha != alpha}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": dropout,
        "target_modules": f"(?:{'|'.join(map(re.escape, updates))})",
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def peft_entries(
    updates: Mapping[str, Update], whole: Mapping[str, tuple[TensorSpec, Vector]], base: Base | None
) -> tuple[list[Entry], list[str]]:
    """Return the tensors of `adapter_model.safetensors`, and the paths of the modules that are saved whole.

    Args:
        updates: by the paths of the adapted modules.
        whole: what is trained whole, by its name in the model.
        base: where the other tensors of such modules come from; None: there are no others.

    Raises:
        InvalidInput: peft cannot hold it; the text says why.
    """
    entries = [
        entry_of(f"{PEFT_PREFIX}{path}.lora_{factor}.weight", "float32", values)
        for path, update in updates.items()
        for factor, values in (("A", update.a_rn), ("B", update.b_mr))
    ]
    entries += [entry_of(PEFT_PREFIX + name, tensor.dtype, values) for name, (tensor, values) in whole.items()]
    saved = _saved_modules(whole)
    others: list[str] = []
    if base is not None and whole:
        prefix = prefix_of([*whole, *(f"{path}.weight" for path in updates)], base)
        others = [name for name in (prefix + key for key in base.tensors) if name not in whole]
        for name in others:
            if _is_in(name, saved):
                entries.append(base.tensors[name.removeprefix(prefix)].as_entry(PEFT_PREFIX + name))
    elif partly := [path for path in saved if f"{path}.bias" in whole and f"{path}.weight" not in whole]:
        raise InvalidInput(
            f"of {partly[0]} only the bias was trained, and peft saves whole modules: name the model's folder with"
            " --base, or choose --format weights or merged"
        )
    _check_paths(saved, updates, [*others, *whole])
    return entries, saved


def _saved_modules(names: Iterable[str]) -> list[str]:
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if "" in paths:
        raise InvalidInput(
            "peft saves whole modules, and a weight that was trained is in none: choose --format weights"
        )
    return [path for path in paths if not _is_in(path, [other for other in paths if other != path])]


def _check_paths(saved: Sequence[str], updates: Iterable[str], names: Iterable[str]) -> None:
    """Check that peft saves what is meant and nothing else."""
    leaves = [*updates, *(name.rpartition(".")[0] for name in names)]
    paths = {
        ".".join(parts[:size]) for parts in (leaf.split(".") for leaf in leaves) for size in range(1, len(parts) + 1)
    }
    for path in saved:
        if alike := sorted(other for other in paths if other.endswith(path) and other != path):
            raise InvalidInput(
                f"peft takes {alike[0]} for {path}, which was trained whole: choose --format weights or merged"
            )
        if inside := [other for other in updates if _is_in(other, [path])]:
            raise InvalidInput(
                f"{path} has a weight that was trained whole, and peft would save {inside[0]} in it: choose --format"
                " weights or merged"
            )


def _is_in(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(path + ".") for path in paths)
