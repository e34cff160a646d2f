"""What the server knows of adapters: how LoRA tensors are named and exported. No torch here.

A LoRA layout has, for every adapted linear layer, `<module path>.lora_A.weight` (rank × in) and
`<module path>.lora_B.weight` (out × rank) in group `ADAPTER_GROUP`. The `peft` package keeps the same two
tensors under `PEFT_PREFIX` + that name, so an export renames and copies; nothing is transposed or
rescaled. What is trained whole is in group `FULL_GROUP`, behind an adapter's tensors, under its name in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import Field, JsonValue

from fedcore.errors import LayoutError
from fedcore.layout import BASIS_GROUP, Layout
from fedcore.params import Params

ADAPTER_GROUP: Final = "adapter"
FULL_GROUP: Final = "model"
_A: Final = ".lora_A.weight"
_B: Final = ".lora_B.weight"
_R: Final = ".lora_R.weight"


class LowRankParams(Params):
    """What the adapters of low rank have in common."""

    rank: int = Field(default=8, ge=1, le=4096, description="r: inner dimension of the update.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the update's input, in training only.")
    targets: list[str] = Field(
        default=["*"],
        min_length=1,
        max_length=256,
        description="Shell patterns for module paths or their last part.",
    )
    trainable: list[str] = Field(
        default=[],
        max_length=256,
        description="Shell patterns for names of parameters that are trained whole beside the adapter.",
    )
    ranks: dict[str, int] = Field(
        default={}, max_length=256, description="Lower ranks of some clients, by shell pattern of their names."
    )


class LoraParams(LowRankParams):
    """Keys of `[adapter]` with `name = "lora"` (Hu et al., LoRA, 2021).

    The adapted layer computes `W x + b + (alpha / rank) · B A dropout(x)`.
    """

    alpha: float = Field(default=16.0, gt=0, le=65536, description="The update is scaled by alpha / rank.")


class LoraSbParams(LowRankParams):
    """Keys of `[adapter]` with `name = "lora-sb"` (Ponkshe et al., LoRA-SB, 2024; Singhal et al., Fed-SB, 2025).

    The adapted layer computes `W x + b + B R A dropout(x)`, R of rank × rank. B and A are set by the server in the
    job's first round, from the clients' gradients; R is trained.
    """

    samples: int = Field(default=64, ge=1, le=1_000_000, description="Examples of each client's first gradient.")
    votes: bool = Field(default=False, description="Send the gradient's signs alone, one bit each, as votes.")
    step: float = Field(default=1e-3, gt=0, le=1, description="Eta: the first step is this times the gradient's sign.")

    @property
    def gradient_codec(self) -> dict[str, JsonValue]:
        """The stage that the clients' gradients are sent through, whatever the job does to its updates."""
        return {"codec": "sign", "scale": 1.0} if self.votes else {"codec": "raw"}


class FullParams(Params):
    """Keys of `[adapter]` with `name = "full"`."""

    trainable: list[str] = Field(
        default=["*"], min_length=1, max_length=256, description="Shell patterns for names of parameters."
    )


GRADIENT_START: Final = frozenset({"lora-sb"})
"""Adapters that start from the clients' gradients."""
ALTERNATING: Final = frozenset({"rolora"})
"""Adapters that train B from even versions, and A from odd ones."""
LORA_PARAMS: Final[Mapping[str, type[LowRankParams]]] = {
    "lora": LoraParams,
    "ffa-lora": LoraParams,
    "lora-sb": LoraSbParams,
    "rolora": LoraParams,
}
PEFT_ADAPTERS: Final = frozenset(LORA_PARAMS)
"""Adapters that are exported for the `peft` package."""
PEFT_STARTS: Final = frozenset({"lora", "ffa-lora", "rolora"})
"""Adapters whose jobs can start from one of the `peft` package."""
PEFT_PREFIX: Final = "base_model.model."
"""What the `peft` package puts before a tensor's name."""


def basis_modules(layout: Layout) -> dict[str, tuple[int, int, int]]:
    """Return the path of each module between whose frozen factors R is trained, with m, n and r, in layout order.

    Raises:
        LayoutError: the layout is not one of complete R, A, B triples, or a rank is above min(m, n).
    """
    shapes = {(tensor.group, tensor.name): tensor.shape for tensor in layout.tensors}
    modules: dict[str, tuple[int, int, int]] = {}
    for tensor in layout.moving.tensors:
        if tensor.group != ADAPTER_GROUP or not tensor.name.endswith(_R):
            continue
        module = tensor.name.removesuffix(_R)
        a, b = (shapes.pop((BASIS_GROUP, module + factor), ()) for factor in (_A, _B))
        if not len(a) == len(b) == 2 or not tensor.shape == (a[0], a[0]) == (b[1], b[1]):
            raise LayoutError(f"module {module}: R {tensor.shape}, A {a} and B {b} are not (r, r), (r, n) and (m, r)")
        if a[0] > min(b[0], a[1]):
            raise LayoutError(f"module {module}: rank {a[0]}, above min({b[0]}, {a[1]})")
        modules[module] = (b[0], a[1], a[0])
    if extra := [name for group, name in shapes if group == BASIS_GROUP]:
        raise LayoutError(f"tensor {extra[0]} of the basis belongs to no R")
    if not modules:
        raise LayoutError("no tensor is an R between two factors")
    return modules


def gradient_layout(layout: Layout) -> Layout:
    """Return the layout of the gradients by the adapted weights, m x n each; raises like `basis_modules`."""
    return Layout.of(("gradient", name, (m, n), "float32") for name, (m, n, _) in basis_modules(layout).items())


def is_lora_factor(name: str) -> bool:
    """Whether a tensor's name is that of A or B of an adapted layer."""
    return name.endswith((_A, _B))


def adapted_modules(layout: Layout) -> dict[str, int]:
    """Return the adapted modules' paths with their ranks, in layout order, for any adapter of `PEFT_ADAPTERS`.

    Raises:
        LayoutError: the layout is none of theirs.
    """
    if any(tensor.name.endswith(_R) for tensor in layout.tensors):
        return {module: rank for module, (_, _, rank) in basis_modules(layout).items()}
    return lora_modules(layout)


def lora_modules(layout: Layout) -> dict[str, int]:
    """Return the adapted modules' paths with their ranks, in layout order; what is trained whole is passed over.

    Raises:
        LayoutError: the layout is not one of complete A, B pairs of one rank each.
    """
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors if tensor.group != FULL_GROUP}
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
    if not modules:
        raise LayoutError("no tensor is a LoRA factor")
    return modules
