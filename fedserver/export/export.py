"""Turns a version into a folder of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedcore.errors import InvalidInput, LayoutError, StateUnusable
from fedcore.layout import TensorSpec, Vector
from fedserver.export.base import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    MODEL_FILE,
    PLOT_FILE,
    Exportable,
    Exported,
    Format,
    State,
)
from fedserver.export.card import base_model_of, model_card
from fedserver.export.factors import Update, updates_of, whole_tensors
from fedserver.export.folder import Content, publish
from fedserver.export.merged import Merge, merged_files
from fedserver.export.peft import peft_config, peft_entries
from fedserver.export.plot import plot_png, plotting_installed
from fedserver.export.stored import INDEX_FILE, Base, open_base
from fedserver.export.weights import safetensors_chunks, safetensors_file


def export_version(
    what: Exportable,
    state: State,
    out: Path,
    *,
    form: Format | None = None,
    base: Path | None = None,
    force: bool = False,
) -> Exported:
    """Write a version as files into the folder `out`, which afterwards holds the whole export or is as before.

    Blocks for as long as the disk takes.

    Args:
        what: the version and its history.
        state: the version's vector, raw little-endian float32.
        out: a folder that is missing or empty; what is missing above it is made too.
        form: what to write; None: a PEFT adapter if the job's adapter is low-rank, else weights.
        base: folder of the base model; needed for a merged model, and for an adapter beside which only a part of a
            module was trained.
        force: replace an earlier export in `out`.

    Raises:
        InvalidInput: `out` is in use, the job's adapter section does not fit its layout, or the format does not fit
            the job or the base.
        StateUnusable: `state` is not what `what` says.
        StorageFailed: the disk is full, read-only, failing; nothing is left behind.
    """
    if what.layout.num_basis_values and what.basis_sha256 is None:
        raise InvalidInput(
            f"version {what.version} of job {what.job.job.name!r} is the base model: the job starts from gradients, and"
            " has factors to export from version 1 on"
        )
    form = form or (Format.PEFT if what.is_lora else Format.WEIGHTS)
    opened = _open_base(base, form, out)
    _check_state(what, state)
    metadata = {
        "format": "pt",  # transformers and peft ask for it
        "federation": what.federation,
        "job_id": what.job_id,
        "job_name": what.job.job.name,
        "version": str(what.version),
        "state_sha256": what.state_sha256,
    }
    with_plot = plotting_installed()
    files, weights_file = _weights(what, state, form, opened, metadata)
    files[CARD_FILE] = [model_card(what, form=form, with_plot=with_plot).encode()]
    if with_plot:
        files[PLOT_FILE] = [plot_png(what.rows)]
    folder = publish(files, out, force=force)
    return Exported(
        folder=folder,
        files=tuple(folder / name for name in sorted(files)),
        weights=folder / weights_file,
        model_card=folder / CARD_FILE,
        adapter=folder if form is Format.PEFT else None,
        plot=folder / PLOT_FILE if with_plot else None,
    )


def _open_base(base: Path | None, form: Format, out: Path) -> Base | None:
    if base is None:
        if form is Format.MERGED:
            raise InvalidInput("format merged: name the folder of the base model's safetensors files with --base")
        return None
    if form is Format.WEIGHTS:
        raise InvalidInput("--base goes with format merged or peft: format weights has trained tensors alone")
    if os.path.realpath(base) == os.path.realpath(out):
        raise InvalidInput(f"{out} is the base model's own folder: name another one")
    return open_base(base)


def _weights(
    what: Exportable, state: State, form: Format, base: Base | None, metadata: Mapping[str, str]
) -> tuple[dict[str, Content], str]:
    """Return the files that depend on the format, and which of them holds the weights."""
    if form is Format.WEIGHTS:
        if what.changes:
            rule = what.job.aggregator.rule
            raise InvalidInput(f"format weights: rule {rule} has changed frozen matrices too; choose peft or merged")
        return {MODEL_FILE: safetensors_chunks(_keys(what), what.layout, state, metadata)}, MODEL_FILE
    if form is Format.PEFT and not what.is_lora:
        raise InvalidInput(f"format peft: adapter {what.job.adapter.name} is not low-rank; choose another format")
    updates, whole = _trained(what, state)
    if form is Format.MERGED:
        assert base is not None
        files = merged_files(Merge.of(base, updates, whole), what.job, metadata)
        return files, INDEX_FILE if base.is_sharded else MODEL_FILE
    entries, saved = peft_entries(updates, whole, base)
    dropout = what.job.adapter.params.get("dropout", 0.0)
    assert isinstance(dropout, int | float)  # `updates_of` has parsed the adapter's parameters
    config = peft_config(updates, dropout, saved) | {"base_model_name_or_path": base_model_of(what.job)}
    return {
        ADAPTER_FILE: safetensors_file(entries, metadata),
        ADAPTER_CONFIG_FILE: [json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"],
    }, ADAPTER_FILE


def _trained(what: Exportable, state: State) -> tuple[dict[str, Update], dict[str, tuple[TensorSpec, Vector]]]:
    """Return what the job has done to adapted modules, by path, and to whole tensors, by name."""
    updates = updates_of(what, state)
    values = what.layout.unflatten(np.frombuffer(state, dtype="<f4"))
    whole = {tensor.name: (tensor, values[tensor.group, tensor.name]) for tensor in whole_tensors(what)}
    if not what.is_lora and len(whole) < len(what.layout.tensors):
        raise InvalidInput(
            f"adapter {what.job.adapter.name}: only it knows what its tensors do to a model; choose format weights"
        )
    if doubled := [name for name in whole if name.removesuffix(".weight") in updates]:
        raise LayoutError(f"tensor {doubled[0]} is trained whole and adapted")
    return updates, whole


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


def _keys(what: Exportable) -> list[str]:
    """Return each tensor's key in a file of weights, in layout order."""
    names = [tensor.name for tensor in what.layout.tensors]
    if len(set(names)) == len(names):
        return names
    return [f"{tensor.group}/{tensor.name}" for tensor in what.layout.tensors]
