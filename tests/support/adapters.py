"""PEFT adapter folders, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from fedcore.adapters import PEFT_PREFIX
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedcore.rng import stream

RANK, ALPHA = 2, 8.0
SIDES = {"first": (6, 5), "block.second": (4, 6)}

Tensors = dict[str, npt.NDArray[Any]]


def factors(sides: Mapping[str, tuple[int, int]] = SIDES, rank: int = RANK) -> Tensors:
    """Return A and B of each layer of m outputs and n inputs under PEFT's names."""
    tensors: Tensors = {}
    for layer, (m, n) in sides.items():
        for factor, shape in (("A", (rank, n)), ("B", (m, rank))):
            name = f"{layer}.lora_{factor}.weight"
            tensors[PEFT_PREFIX + name] = stream(9, name).standard_normal(shape).astype(np.float32)
    return tensors


def layout_of(sides: Mapping[str, tuple[int, int]] = SIDES, rank: int = RANK) -> Layout:
    """Return the layout that a client of a job with adapter `lora` has for such layers."""
    return Layout.of(
        ("adapter", f"{layer}.lora_{factor}.weight", shape, "float32")
        for layer, (m, n) in sides.items()
        for factor, shape in (("A", (rank, n)), ("B", (m, rank)))
    )


def config(**changes: Any) -> bytes:
    tree = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["first"]}
    return json.dumps(tree | changes).encode()


def write_adapter(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(config(**changes))
    return folder


def job_with(name: str = "lora", *, rounds: int = 1, task: str = "played", **adapter: Any) -> Job:
    return parse_job(
        {
            "job": {"name": "given", "rounds": rounds, "seed": 3},
            "task": {"name": task},
            "adapter": {"name": name, **({"rank": RANK, "alpha": ALPHA} | adapter if name != "full" else {})},
            "schedule": {"cohort": 1, "deadline_s": 60.0, "max_retries": 0},
        },
        "given",
    )
