"""What the server knows of adapters: how LoRA tensors are named and exported. No torch here.

A LoRA layout has, for every adapted linear layer, `<module path>.lora_A.weight` (rank × in) and
`<module path>.lora_B.weight` (out × rank) in group `ADAPTER_GROUP`. The `peft` package keeps the same two
tensors under `base_model.model.` + that name, so an export renames and copies; nothing is transposed or
rescaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pydantic import Field, JsonValue

from fedcore.errors import LayoutError
from fedcore.layout import Layout
from fedcore.params import Params, parse_params

ADAPTER_GROUP: Final = "adapter"
FULL_GROUP: Final = "model"

_A: Final = ".lora_A.weight"
_B: Final = ".lora_B.weight"


class LoraParams(Params):
    """Keys of `[adapter]` with `name = "lora"` (Hu et al., LoRA, 2021).

    The adapted layer computes `W x + b + (alpha / rank) · B A dropout(x)`.
    """

    rank: int = Field(default=8, ge=1, le=4096, description="r: inner dimension of the update.")
    alpha: float = Field(default=16.0, gt=0, le=65536, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the update's input, in training only.")
    targets: list[str] = Field(
        default=["*"],
        min_length=1,
        max_length=256,
        description="Shell patterns for module paths or their last part.",
    )


class FullParams(Params):
    """`name = "full"` has no further keys."""


def peft_state_names(layout: Layout) -> dict[str, str]:
    """Return for each tensor name of a LoRA layout its key in `adapter_model.safetensors`.

    Raises:
        LayoutError: the layout is not one of complete A, B pairs of one rank each.
    """
    lora_modules(layout)
    return {tensor.name: f"base_model.model.{tensor.name}" for tensor in layout.tensors}


def peft_config(params: Mapping[str, object], layout: Layout) -> dict[str, JsonValue]:
    """Return the content of `adapter_config.json` for a job's adapter parameters and layout.

    The adapted modules are named by a regular expression of their full paths. In a list, peft would also take
    `block.0` for `0`.

    Raises:
        InvalidInput: `params` are not LoRA parameters.
        LayoutError: the layout is not that of a LoRA adapter of this rank.
    """
    lora = parse_params(LoraParams, params, "adapter")
    modules = lora_modules(layout)
    for module, rank in modules.items():
        if rank != lora.rank:
            raise LayoutError(f"module {module} has rank {rank}, the job says {lora.rank}")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": f"(?:{'|'.join(map(re.escape, modules))})",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def lora_modules(layout: Layout) -> dict[str, int]:
    """Return the adapted modules' paths with their ranks, in layout order.

    Raises:
        LayoutError: the layout is not one of complete A, B pairs of one rank each.
    """
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    modules: dict[str, int] = {}
    for name, shape in shapes.items():
        if not name.endswith((_A, _B)):
            raise LayoutError(f"tensor {name} is not a LoRA factor: the name ends neither in {_A} nor in {_B}")
        module = name.removesuffix(_A).removesuffix(_B)
        other = shapes.get(module + (_B if name.endswith(_A) else _A))
        if other is None:
            raise LayoutError(f"tensor {name}: the other LoRA factor of {module} is missing")
        a, b = (shape, other) if name.endswith(_A) else (other, shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise LayoutError(f"module {module}: factors {a} and {b} are not (rank, in) and (out, rank)")
        modules[module] = a[0]
    return modules
