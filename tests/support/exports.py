"""Jobs and histories to export."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.jobfile import Job, parse_job
from fedcore.layout import Layout
from fedserver.export import Exportable, Exported, export_version

if TYPE_CHECKING:
    from fedclient.adapters.base import AdaptedModel

LORA = Layout.of(
    [
        ("adapter", "hidden.lora_A.weight", (2, 3), "float32"),
        ("adapter", "hidden.lora_B.weight", (4, 2), "float32"),
    ]
)
FULL = Layout.of([("model", "hidden.weight", (4, 3), "float32"), ("model", "hidden.bias", (4,), "bfloat16")])


def make_job(**sections: dict[str, Any]) -> Job:
    tree: dict[str, Any] = {
        "job": {"name": "digits", "rounds": 60, "description": "Everybody's digits."},
        "task": {"name": "digits", "data": "Handwritten digits.", "partition": {"kind": "dirichlet"}},
        "adapter": {"name": "lora", "rank": 2, "alpha": 8},
        "schedule": {"cohort": 5, "quorum": 3, "deadline_s": 60},
    }
    return parse_job(tree | sections, "test")


def make_state(layout: Layout) -> bytes:
    return np.linspace(-1, 1, layout.num_values, dtype="<f4").tobytes()


def make_history(state: bytes, version: int, *, later: int = 0, measured: bool = True) -> list[dict[str, Any]]:
    """Return the rows of versions 0 to `version`, whose state is `state`, and `later` more."""
    digest = hashlib.sha256(state).hexdigest()
    return [
        {
            "version": number,
            "created_at": 1_800_000_000.0 + number,
            "num_updates": 5 if number else 0,
            "num_examples": 1400 + number if number else 0,
            "uplink_bytes": 5000 if number else 1000,
            "downlink_bytes": 4000 if number else 0,
            "sha256": digest if number == version else f"{number:064x}",
            "evaluation": {"accuracy": 0.25 + number / 1000, "loss": 2 - number / 100, "num_examples": 356.0}
            if measured
            else {},
        }
        for number in range(version + 1 + later)
    ]


def make_exportable(
    layout: Layout, *, version: int = 2, job: Job | None = None, history: list[dict[str, Any]] | None = None
) -> tuple[Exportable, bytes]:
    """Return a version and its state."""
    state = make_state(layout)
    what = Exportable(
        federation="north",
        job_id="digits-0001",
        job=job or make_job(**({} if layout is LORA else {"adapter": {"name": "full"}})),
        layout=layout,
        version=version,
        state_sha256=hashlib.sha256(state).hexdigest(),
        history=make_history(state, version) if history is None else history,
    )
    return what, state


def export(
    model: AdaptedModel, adapter: dict[str, Any], folder: Path, task: dict[str, Any] | None = None, **options: Any
) -> Exported:
    """Export what a model holds, as version 2 of a job with this `[adapter]` section."""
    trained, state = model.read().tobytes(), model.read_all().tobytes()
    basis = state[len(trained) :]
    what = Exportable(
        federation="north",
        job_id="job-1",
        job=make_job(adapter=adapter, **({} if task is None else {"task": task})),
        layout=model.layout,
        version=2,
        state_sha256=hashlib.sha256(trained).hexdigest(),
        history=make_history(trained, 2),
        basis_sha256=hashlib.sha256(basis).hexdigest() if basis else None,
    )
    return export_version(what, state, folder, **options)
