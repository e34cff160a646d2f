"""The command `fedclient`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedcore import logs
from fedcore.allocator import keep_memory
from fedcore.cli import JsonOption, LogFormatOption, LogLevelOption, new_app, print_json, run_app
from fedcore.clock import SystemClock
from fedcore.errors import ConfigError, Exit

PROGRAM = "fedclient"
DEFAULT_FOLDER = Path("roundtable-client")

app = new_app("A Roundtable client: it trains on this machine's data and sends updates; the data stays.")

FolderOption = Annotated[Path, typer.Option("--folder", help="Where this client's identity is kept.")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="KEY=VALUE",
        help="An option for this client's tasks, such as where its data lies. Repeatable.",
    ),
]
TaskFileOption = Annotated[
    list[Path] | None,
    typer.Option("--task-file", metavar="FILE", help="A Python file of yours with one task. Repeatable."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (CUDA where there is any), cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int, typer.Option("--threads", help="CPU threads for computing.")]
ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="Dial this address instead of the one from enrolment."),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", metavar="FILE", help="What this client accepts; policy.toml in the folder unless told otherwise."
    ),
]


@app.command()
def enroll(
    token: Annotated[
        str, typer.Option("--token", help="The token, @FILE, or - for standard input (others can see command lines).")
    ],
    folder: FolderOption = DEFAULT_FOLDER,
    force: Annotated[bool, typer.Option("--force", help="Replace the identity that the folder holds.")] = False,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> None:
    """Join a federation with a one-time token from its operator (`fedserver token`)."""
    from fedclient.enroll import enroll as join
    from fedclient.enroll import read_token

    logs.configure(log_level, log_format=log_format)
    identity = asyncio.run(join(read_token(token), folder, SystemClock(), force=force))
    if as_json:
        print_json(
            {
                "client": identity.client,
                "federation": identity.federation,
                "server": identity.server,
                "folder": str(folder),
                "expires_at": identity.expires_at,
            }
        )
    else:
        typer.echo(f"enrolled as {identity.client} in federation {identity.federation}; identity in {folder}")
        typer.echo(f"next: fedclient run --folder {folder}")


@app.command()
def run(
    folder: FolderOption = DEFAULT_FOLDER,
    data: DataOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
    server: ServerOption = None,
    policy: PolicyOption = None,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "info",
) -> int:
    """Work for the federation until stopped.

    Ctrl-C or SIGTERM ends local training at its next step and leaves; a second one ends at once.
    """
    keep_memory()

    from fedclient.daemon import ClientSettings, run_client

    logs.configure(log_level, log_format=log_format)
    settings = ClientSettings(folder, parse_data(data or []), tuple(task_file or ()), device, threads, server, policy)
    return asyncio.run(run_client(settings))


@app.command()
def check(
    folder: FolderOption = DEFAULT_FOLDER,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
    server: ServerOption = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> int:
    """Say whether the identity is valid, the device usable, the policy in order and the server reachable.

    The exit code is that of the first thing that is wrong.
    """
    from fedclient.check import check_client
    from fedclient.daemon import ClientSettings

    logs.configure(log_level, log_format=log_format)
    settings = ClientSettings(folder, device=device, threads=threads, server=server)
    findings = asyncio.run(check_client(settings, SystemClock()))
    if as_json:
        print_json(
            {
                finding.name: {"ok": finding.exit_code is Exit.OK, "text": finding.text, "exit_code": finding.exit_code}
                for finding in findings
            }
        )
    else:
        for finding in findings:
            typer.echo(f"{'ok ' if finding.exit_code is Exit.OK else 'BAD'}  {finding.name:<8}  {finding.text}")
    return next((finding.exit_code for finding in findings if finding.exit_code is not Exit.OK), Exit.OK)


@app.command()
def privacy(
    folder: FolderOption = DEFAULT_FOLDER,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> None:
    """Show what this client has released, what that guarantees, and what its policy still allows."""
    from fedclient.daemon import ClientSettings, own_policy
    from fedclient.ledger import FileLedger
    from fedclient.spending import report

    logs.configure(log_level, log_format=log_format)
    found = report(FileLedger(folder).read(), own_policy(ClientSettings(folder, policy=policy)))
    if as_json:
        print_json(found.as_json())
    else:
        typer.echo(found.text())


@app.command()
def base(
    path: Annotated[Path, typer.Argument(help="A folder with safetensors files, or a job file.", show_default=False)],
    data: DataOption = None,
    task_file: TaskFileOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 1,
    as_json: JsonOption = False,
    log_format: LogFormatOption = "auto",
    log_level: LogLevelOption = "warning",
) -> None:
    """Print the digest of a base model's weights, to be compared with that of others.

    Of a folder: of all that its safetensors files hold. Of a job file: of what stays frozen of the model that this
    client builds for it, which is what `job.base_digest` pins.
    """
    from fedclient.check import base_of
    from fedclient.daemon import ClientSettings

    logs.configure(log_level, log_format=log_format)
    settings = ClientSettings(Path(), parse_data(data or []), tuple(task_file or ()), device, threads)
    digest = base_of(path, settings)
    if as_json:
        print_json({"path": str(path), "base_digest": digest})
    else:
        typer.echo(digest or "none: nothing of the model is frozen")


def parse_data(pairs: list[str]) -> dict[str, str]:
    """Return ``KEY=VALUE`` texts as a mapping.

    Raises:
        ConfigError: one has no ``=`` or no key, or a key is given twice.
    """
    data: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--data {pair[:80]!r}: expected KEY=VALUE")
        if key in data:
            raise ConfigError(f"--data {key!r} is given twice: {data[key]!r} and {value!r}")
        data[key] = value
    return data


def main() -> NoReturn:
    """Run the command line of this process."""
    sys.exit(run_app(app, PROGRAM))


if __name__ == "__main__":
    main()
