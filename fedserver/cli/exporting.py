"""`fedserver export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcore.cli import JsonOption, print_json
from fedserver.cli.options import DEFAULT_FOLDER, FolderOption, JobArgument


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(export)


def export(
    job: JobArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder to make, or an empty one.", show_default=False)
    ],
    folder: FolderOption = DEFAULT_FOLDER,
    version: Annotated[
        int | None, typer.Option("--version", min=0, help="Which version; default: the newest.", show_default=False)
    ] = None,
    form: Annotated[
        Literal["peft", "merged", "weights"] | None,
        typer.Option(
            "--format",
            help="peft: an adapter folder; merged: a whole model; weights: trained tensors alone."
            " Default: peft for adapters of LoRA's kind, else weights.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="DIR", help="Folder of the base model's safetensors files.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DIR.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a version as files for other programs.

    Weights as safetensors (for LoRA a PEFT adapter folder, on demand a merged model), a model card, a plot.
    """
    from fedcore.jobfile import Job
    from fedcore.layout import Layout
    from fedserver.cli.connect import operator
    from fedserver.cli.progress import progress
    from fedserver.export import Exportable, Format, export_version

    with operator(folder) as server:
        status = server.status(job)
        wanted = server.version(job, version)
        with progress("download", wanted.num_bytes) as on_bytes:
            data = server.read_version(wanted, on_bytes)
    what = Exportable(
        federation=str(status["federation"]),
        job_id=wanted.job_id,
        job=Job.from_json(wanted.job),
        layout=Layout.from_json(wanted.layout),
        version=wanted.version,
        state_sha256=wanted.sha256,
        basis_sha256=wanted.basis_sha256,
        base_digest=wanted.base_digest,
        adapter_sha256=wanted.adapter_sha256,
        history=wanted.history,
        changes=wanted.changes_in(data),
        privacy=status["jobs"][0]["privacy"],
    )
    made = export_version(what, data[: wanted.state_bytes], out, form=form and Format(form), base=base, force=force)
    if as_json:
        print_json(
            {
                "job_id": what.job_id,
                "version": what.version,
                "sha256": what.state_sha256,
                "folder": str(made.folder),
                "files": [str(path) for path in made.files],
                "weights": str(made.weights),
                "model_card": str(made.model_card),
                "adapter": None if made.adapter is None else str(made.adapter),
                "plot": None if made.plot is None else str(made.plot),
            }
        )
        return
    typer.echo(f"version {what.version} of {what.job.job.name} in {made.folder}:")
    for path in made.files:
        typer.echo(f"  {path.name}")
