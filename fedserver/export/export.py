"""Turns a version into a folder of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedcore.adapters import peft_config, peft_state_names
from fedcore.errors import InvalidInput, LayoutError, StateUnusable
from fedcore.layout import Layout
from fedserver.export.base import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    MODEL_FILE,
    PLOT_FILE,
    Exportable,
    Exported,
)
from fedserver.export.card import base_model_of, model_card
from fedserver.export.fold import as_lora
from fedserver.export.folder import Content, publish
from fedserver.export.plot import plot_png, plotting_installed
from fedserver.export.weights import safetensors_chunks


def export_version(
    what: Exportable, state: bytes | bytearray | memoryview, out: Path, *, force: bool = False
) -> Exported:
    """Write a version as files into the folder `out`, which afterwards holds the whole export or is as before.

    Blocks for as long as the disk takes.

    Args:
        what: the version and its history.
        state: the version's vector, raw little-endian float32.
        out: a folder that is missing or empty; what is missing above it is made too.
        force: replace an earlier export in `out`.

    Raises:
        InvalidInput: `out` is in use, or the job's adapter section does not fit its layout.
        StateUnusable: `state` is not what `what` says.
        StorageFailed: the disk is full, read-only, failing; nothing is left behind.
    """
    if what.layout.num_basis_values and what.basis_sha256 is None:
        raise InvalidInput(
            f"version {what.version} of job {what.job.job.name!r} is the base model: the job starts from gradients, and"
            " has factors to export from version 1 on"
        )
    _check_state(what, state)
    layout, state = as_lora(what.layout, state) if what.job.adapter.name == "lora-sb" else (what.layout, state)
    weights_file = ADAPTER_FILE if what.is_lora else MODEL_FILE
    metadata = {
        "format": "pt",  # transformers and peft ask for it
        "federation": what.federation,
        "job_id": what.job_id,
        "job_name": what.job.job.name,
        "version": str(what.version),
        "state_sha256": what.state_sha256,
    }
    with_plot = plotting_installed()
    files: dict[str, Content] = {
        weights_file: safetensors_chunks(_keys(what, layout), layout, state, metadata),
        CARD_FILE: [model_card(what, with_plot=with_plot).encode()],
    }
    if what.is_lora:
        config = peft_config(what.job.adapter.name, what.job.adapter.params, layout) | {
            "base_model_name_or_path": base_model_of(what.job)
        }
        files[ADAPTER_CONFIG_FILE] = [json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"]
    if with_plot:
        files[PLOT_FILE] = [plot_png(what.rows)]
    folder = publish(files, out, force=force)
    return Exported(
        folder=folder,
        files=tuple(folder / name for name in sorted(files)),
        weights=folder / weights_file,
        model_card=folder / CARD_FILE,
        adapter=folder if what.is_lora else None,
        plot=folder / PLOT_FILE if with_plot else None,
    )


def _check_state(what: Exportable, state: bytes | bytearray | memoryview) -> None:
    where = f"version {what.version} of job {what.job_id}"
    num_bytes = memoryview(state).nbytes
    if num_bytes != 4 * what.layout.num_values:
        raise StateUnusable(f"{where}: the state has {num_bytes} bytes, its layout {4 * what.layout.num_values}")
    trained = 4 * what.layout.moving.num_values
    parts: dict[str, tuple[memoryview, str | None]] = {"state": (memoryview(state)[:trained], what.state_sha256)}
    if what.layout.num_basis_values:
        parts["basis"] = (memoryview(state)[trained:], what.basis_sha256)
    for name, (part, announced) in parts.items():
        digest = hashlib.sha256(part).hexdigest()
        if digest != announced:
            raise StateUnusable(f"{where}: the {name}'s SHA-256 is {digest}, recorded is {announced}")
    recorded = {row["version"]: row["sha256"] for row in what.history}.get(what.version)
    if recorded != what.state_sha256:
        raise StateUnusable(f"{where}: the history says {recorded}, the version {what.state_sha256}")


def _keys(what: Exportable, layout: Layout) -> list[str]:
    """Return each tensor's key in the file, in layout order.

    Raises:
        LayoutError: two tensors would have one key.
    """
    names = [tensor.name for tensor in layout.tensors]
    unique = len(set(names)) == len(names)
    if what.is_lora:
        if not unique:
            raise LayoutError("a LoRA layout has each tensor name once; here one is in two groups")
        peft_names = peft_state_names(layout)
        return [peft_names[name] for name in names]
    return names if unique else [f"{tensor.group}/{tensor.name}" for tensor in layout.tensors]
