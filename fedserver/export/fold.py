"""An adapter of three factors as one of two, which is what other programs read."""

from __future__ import annotations

import numpy as np

from fedcore.adapters import ADAPTER_GROUP, basis_modules
from fedcore.errors import LayoutError
from fedcore.layout import BASIS_GROUP, Layout


def as_lora(layout: Layout, state: bytes | bytearray | memoryview) -> tuple[Layout, bytes]:
    """Return W + B R A as W + (B R) A: the layout and values of a LoRA adapter of the same rank and scale 1.

    Args:
        layout: of R and the basis.
        state: its values, raw little-endian float32.

    Raises:
        LayoutError: `layout` is not one of complete R, A, B triples alone.
    """
    values = layout.unflatten(np.frombuffer(state, dtype="<f4"))
    modules = basis_modules(layout)
    if others := [t.name for t in layout.moving.tensors if t.name.removesuffix(".lora_R.weight") not in modules]:
        raise LayoutError(f"tensor {others[0]} is trained beside the factors, and has no place in a LoRA adapter")
    rows: list[tuple[str, str, tuple[int, ...], str]] = []
    folded = []
    for module in modules:
        a_rn, b_mr = (values[BASIS_GROUP, f"{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
        r_rr = values[ADAPTER_GROUP, f"{module}.lora_R.weight"]
        b_mr = (b_mr.astype(np.float64) @ r_rr).astype("<f4")
        rows += [(ADAPTER_GROUP, f"{module}.lora_A.weight", a_rn.shape, "float32")]
        rows += [(ADAPTER_GROUP, f"{module}.lora_B.weight", b_mr.shape, "float32")]
        folded += [a_rn.ravel(), b_mr.ravel()]
    return Layout.of(rows), np.concatenate(folded).astype("<f4").tobytes()
