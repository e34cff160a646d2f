"""`fedserver cost`: what a round sends, before anything runs. It needs no server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedcore.cli import JsonOption, print_json
from fedcore.errors import InvalidInput

if TYPE_CHECKING:
    from fedserver.cost.cost import Cost, Traffic

DEFAULT_RANK: Final = 8
DEFAULT_CLIENTS: Final = 10


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(cost)


def cost(
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB", help="A job file.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option("--model", help="A model that is known, or FILE.toml with its shapes.", show_default=False)
    ] = "",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Repeatable; default: every method.", show_default=False)
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            "--rank", min=1, max=4096, help=f"Repeatable; default: the job's, or {DEFAULT_RANK}.", show_default=False
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            "--clients",
            min=1,
            max=1_000_000,
            help=f"In a round; default: the job's cohort, or {DEFAULT_CLIENTS}.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Pattern of layers to adapt; repeatable; default: the job's, or the model's."),
    ] = None,
    bytes_per_value: Annotated[int, typer.Option("--bytes-per-value", min=1, max=8, help="Without compression.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Say how many parameters and bytes a round sends, by method, rank and number of clients.

    Of a job, or of a model alone; nothing runs.
    """
    from fedcore.jobfile import load_job
    from fedcore.methods import METHODS, find_method
    from fedserver.cost.cost import cost_of
    from fedserver.cost.jobs import costs_of_job
    from fedserver.cost.shapes import MODELS, find_model, shapes_of

    job = None if job_file is None else costs_of_job(load_job(job_file), str(job_file))
    name = model or ("" if job is None else job.model)
    if not name:
        raise InvalidInput(f"say --model, since only it tells shapes; known: {', '.join(MODELS)}, or FILE.toml")
    table = find_model(name)
    if job is None:
        shapes = shapes_of(table, target or ())
    elif job.method.whole:
        shapes = shapes_of(table, target or (), heads=False, alone=job.trainable)
    else:
        shapes = shapes_of(table, target or job.targets, heads=False, beside=job.trainable)
    wanted = [find_method(each) for each in dict.fromkeys(method or METHODS)]
    ranks = sorted(set(rank or [(job and job.rank) or DEFAULT_RANK]))
    num_clients = clients or (DEFAULT_CLIENTS if job is None else job.clients)
    pipelines = None if job is None else job.pipelines
    costs = [
        cost_of(
            each,
            shapes,
            each_rank,
            num_clients,
            bytes_per_value,
            pipelines,
            lower_ranks=job is not None and job.lower_ranks,
        )
        for each in wanted
        for each_rank in (ranks[:1] if each.whole else ranks)
    ]
    about = {
        "model": shapes.model,
        "matrices": len(shapes.matrices),
        "clients": num_clients,
        "bytes_per_value": bytes_per_value,
        "job": None if job is None else job.name,
        "job_method": None if job is None else job.method.name,
    }
    if not as_json:
        _show(costs, about)
    elif len(costs) == 1:
        print_json({**about, **_flat(costs[0])})
    else:
        print_json({**about, "costs": [_flat(each) for each in costs]})


def _flat(cost: Cost) -> dict[str, Any]:
    """Return a cost as one object: its keys are ``parameters_up`` and the like."""
    ways = {"up": cost.up, "down": cost.down}
    once = {"up": cost.setup_up, "down": cost.setup_down}
    return {
        "method": cost.method,
        "rank": cost.rank,
        **{f"{key}_{way}": value for way, traffic in ways.items() for key, value in asdict(traffic).items()},
        **{f"setup_parameters_{way}": traffic.parameters for way, traffic in once.items()},
        **{f"setup_bytes_{way}": traffic.bytes for way, traffic in once.items()},
        "setup_vote_bytes_up": cost.setup_vote_bytes_up,
    }


def _show(costs: list[Cost], about: dict[str, Any]) -> None:
    from fedserver.cli.text import columns, printable, size_text

    framed = about["job"] is not None
    typer.echo(
        f"{printable(about['model'])}: {about['matrices']} adapted matrices, {about['clients']} clients,"
        f" {about['bytes_per_value']} bytes a value; parameters and bytes of one round"
    )
    heading = ["METHOD", "RANK", "UP", "DOWN", "BYTES UP", "BYTES DOWN", "ALL CLIENTS UP", "ALL CLIENTS DOWN"]
    rows = [[*heading, *(["FRAME UP", "FRAME DOWN"] if framed else [])]]
    for cost in costs:
        rows.append(
            [
                cost.method + (" *" if cost.method == about["job_method"] else ""),
                str(cost.rank or "-"),
                *(" / ".join(f"{turn:,}" for turn in traffic.turns) for traffic in (cost.up, cost.down)),
                *(size_text(traffic.bytes) for traffic in (cost.up, cost.down)),
                *(size_text(traffic.all_bytes) for traffic in (cost.up, cost.down)),
                *([_frame_text(cost.up), _frame_text(cost.down)] if framed else []),
            ]
        )
    typer.echo("\n".join(columns(rows)))
    for cost in costs:
        if cost.setup_down.parameters:
            typer.echo(
                f"{cost.method}, rank {cost.rank}, once before the first round: down {cost.setup_down.parameters:,}"
                f" ({size_text(cost.setup_down.bytes)}); up {cost.setup_up.parameters:,}"
                f" ({size_text(cost.setup_up.bytes)}, or {size_text(cost.setup_vote_bytes_up)} as one bit a value)"
            )
    if framed:
        typer.echo(f"* what job {about['job']} does; frames: through its [compression], ≤ a bound, else exactly")


def _frame_text(traffic: Traffic) -> str:
    if traffic.max_frame_bytes is None:
        return "too long"
    beside = f" + {traffic.change_bytes:,} B" if traffic.change_bytes else ""
    return ("" if traffic.frame_bytes is not None else "≤ ") + f"{traffic.max_frame_bytes:,} B{beside}"
