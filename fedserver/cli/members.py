"""`fedserver token`, `clients` and `revoke`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from fedcore.cli import JsonOption, print_json
from fedserver.cli.options import DEFAULT_FOLDER, FolderOption

ClientArgument = Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(token)
    app.command()(clients)
    app.command()(revoke)


def token(
    client: ClientArgument,
    folder: FolderOption = DEFAULT_FOLDER,
    lifetime: Annotated[
        str, typer.Option("--lifetime", metavar="DURATION", help="How long it may be used: 90s, 15m, 1h, 7d.")
    ] = "1h",
    as_json: JsonOption = False,
) -> None:
    """Print a one-time token for CLIENT.

    Nothing else is printed, so that it can go into a file. With it the client enrols (`fedclient enroll`); a client
    that is enrolled already is replaced.
    """
    from fedserver.cli.connect import operator
    from fedserver.cli.text import parse_duration

    lifetime_s = parse_duration(lifetime)
    with operator(folder) as server:
        text = server.issue_token(client, lifetime_s)
    if as_json:
        print_json({"client": client, "lifetime_s": lifetime_s, "token": text})
        return
    typer.echo(text)
    if sys.stdout.isatty():
        typer.echo(f"{client} has {lifetime} to use it, once: fedclient enroll --token @FILE", err=True)


def clients(folder: FolderOption = DEFAULT_FOLDER, as_json: JsonOption = False) -> None:
    """List every client that ever enrolled."""
    from fedserver.cli.connect import operator
    from fedserver.cli.text import columns, printable, time_text

    with operator(folder) as server:
        found = server.clients()
    if as_json:
        print_json({"clients": [asdict(client) for client in found]})
        return
    if not found:
        typer.echo("nobody has enrolled yet: `fedserver token CLIENT` invites a client")
        return
    rows = [["CLIENT", "STATE", "ENROLLED", "EXPIRES", "DEVICE", "SOFTWARE"]]
    for client in found:
        state = "revoked" if client.revoked else "connected" if client.connected else "away"
        times = [time_text(client.enrolled_at), time_text(client.expires_at)]
        rows.append([client.name, state, *times, printable(client.device), printable(client.software)])
    for line in columns(rows):
        typer.echo(line)


def revoke(
    client: ClientArgument,
    folder: FolderOption = DEFAULT_FOLDER,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Refuse CLIENT from now on.

    Its session is cut and its open tokens are void. A new token lets it back in.
    """
    from fedserver.cli.connect import operator

    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("nobody is here to be asked: say --yes")
        typer.confirm(f"Revoke {client}? Its session ends and its work in hand is lost.", abort=True, err=True)
    with operator(folder) as server:
        server.revoke(client)
    if as_json:
        print_json({"client": client, "revoked": True})
    else:
        typer.echo(f"revoked {client}")
