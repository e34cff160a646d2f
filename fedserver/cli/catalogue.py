"""`fedserver methods` and `fedserver check`: what this installation can run. Neither needs a server."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedcore.cli import JsonOption, print_json
from fedcore.errors import InvalidInput

if TYPE_CHECKING:
    from fedcore.methods import Method
    from fedcore.registry import Registry

_CLIENT_GROUPS: Final = {"adapters": "roundtable.adapters", "tasks": "roundtable.tasks"}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(methods)
    app.command()(check)


def methods(as_json: JsonOption = False) -> None:
    """List codecs, aggregation rules, server optimisers, and methods of federated LoRA."""
    from fedagg import OPTIMIZERS, RULES
    from fedcodec import CODECS
    from fedcore.methods import METHODS

    found = {"codecs": _plugins(CODECS), "rules": _plugins(RULES), "server_optimizers": _plugins(OPTIMIZERS)}
    names = {
        kind: [{"name": point.name, "source": _source(point)} for point in entry_points(group=group)]
        for kind, group in _CLIENT_GROUPS.items()
    }
    if as_json:
        print_json({**found, **names, "methods": [_method(each) for each in METHODS.values()]})
        return
    from fedserver.cli.text import columns

    for title, plugins in found.items():
        rows = [["NAME", "SOURCE", "TRAITS", "WHAT IT IS"]]
        rows += [[row["name"], row["source"], _traits_text(row["traits"]), row["text"]] for row in plugins]
        typer.echo("\n".join([title.replace("_", " "), *(f"  {line}" for line in columns(rows)), ""]))
    rows = [["NAME", "ADAPTER", "RULE", "EXACT", "CHANGES BASE", "UP, A MATRIX", "DOWN, A MATRIX", "SOURCE"]]
    for each in METHODS.values():
        flags = ["yes" if flag else "no" for flag in (each.exact, each.changes_base)]
        rows.append([each.name, each.adapter, each.rule, *flags, each.up_text, each.down_text, each.source])
    typer.echo("\n".join(["methods", *(f"  {line}" for line in columns(rows)), ""]))
    typer.echo(
        "adapters and tasks run on clients, each of which has its own: with them come the adapters of these methods"
    )
    for kind, points in names.items():
        for point in points:
            typer.echo(f"  installed here too, of {kind}: {point['name']} ({point['source']})")


def check(
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB", help="A job file.", show_default=False)] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of job files instead; JOB is not needed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a job file and print it, defaults written out.

    What `submit` checks, without a server. Standard output is a job file again.
    """
    from fedcore.jobfile import job_schema, load_job
    from fedserver.cli.toml_text import toml_text
    from fedserver.rounds.plan import make_plan

    if schema:
        typer.echo(json.dumps(job_schema(), indent=None if as_json else 2))
        return
    if job_file is None:
        raise typer.BadParameter("name a job file, or say --schema")
    tree = make_plan(load_job(job_file), str(job_file)).job.model_dump(mode="json")
    if as_json:
        print_json({"valid": True, "job": tree})
        return
    typer.echo(toml_text(tree))
    typer.echo(f"{job_file}: valid", err=True)


def _plugins(registry: Registry[Any]) -> list[dict[str, Any]]:
    """Return every plugin of one kind; of one that cannot be loaded, why."""
    rows = []
    for name in registry.names():
        points = list(entry_points(group=registry.group, name=name))
        source = ", ".join(map(_source, points)) or "built in"
        try:
            plugin = registry.get(name)
        except InvalidInput as error:
            rows.append({"name": name, "source": source, "traits": {}, "text": str(error)})
            continue
        text = (inspect.getdoc(plugin) or "").partition("\n")[0]
        rows.append({"name": name, "source": source, "traits": _traits(plugin), "text": text})
    return rows


def _method(method: Method) -> dict[str, Any]:
    keys = ("name", "source", "adapter", "rule", "exact", "changes_base")
    return {key: getattr(method, key) for key in keys} | {"up": method.up_text, "down": method.down_text}


def _source(point: Any) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _traits(plugin: Any) -> dict[str, Any]:
    traits = getattr(plugin, "traits", None)
    if is_dataclass(traits) and not isinstance(traits, type):
        return asdict(traits)
    return {"slots": list(plugin.slots)} if hasattr(plugin, "slots") else {}


def _traits_text(traits: dict[str, Any]) -> str:
    words = [name if value is True else str(value) for name, value in traits.items() if value and name != "slots"]
    if slots := traits.get("slots"):
        words.append(f"keeps {', '.join(slots)}")
    return ", ".join(words).replace("_", " ") or "-"
