"""`fedserver init` and `fedserver run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedcore.allocator import keep_memory, use_one_arena
from fedcore.cli import JsonOption, LogFormatOption, LogLevelOption, print_json
from fedserver.cli.options import DEFAULT_FOLDER, FolderOption

if TYPE_CHECKING:
    from fedserver.config import ServerConfig
    from fedserver.daemon import Ready

_MAX_PORT: Final = 65535

PortOption = Annotated[
    int | None,
    typer.Option(
        "--port", min=0, max=_MAX_PORT, help="For clients and operators; 0: any free one.", show_default=False
    ),
]
EnrolmentPortOption = Annotated[
    int | None,
    typer.Option("--enrolment-port", min=0, max=_MAX_PORT, help="For enrolment; 0: any free one.", show_default=False),
]
MetricsPortOption = Annotated[
    int | None,
    typer.Option("--metrics-port", min=0, max=_MAX_PORT, help="For Prometheus; 0: any free one.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(init)
    app.command()(run)


def init(
    folder: FolderOption = DEFAULT_FOLDER,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Name or IP address under which clients reach the server; again for more. The first goes into"
            " tokens. Default: localhost.",
            show_default=False,
        ),
    ] = None,
    port: PortOption = None,
    enrolment_port: EnrolmentPortOption = None,
    metrics_port: MetricsPortOption = None,
    federation: Annotated[
        str, typer.Option("--federation", metavar="NAME", help="The federation's name, in every certificate.")
    ] = "federation",
    as_json: JsonOption = False,
) -> None:
    """Make a new state folder.

    It holds the server's settings, the certificate authority and the operator's keys.
    """
    from fedserver.config import ServerConfig
    from fedserver.daemon import initialise

    hosts = host or []
    config = _changed(
        ServerConfig(),
        public_host=hosts[0] if hosts else None,
        port=port,
        enrolment_port=enrolment_port,
        metrics_port=metrics_port,
    )
    initialise(folder, config, federation, hosts)
    if as_json:
        print_json({"folder": str(folder), "federation": federation, **config.model_dump(mode="json")})
        return
    where = "" if folder == DEFAULT_FOLDER else f" --folder {folder}"
    typer.echo(
        f"made {folder} for federation {federation!r}:\n"
        f"  {folder}/server.toml   settings\n"
        f"  {folder}/keys          certificate authority and operator's keys: back them up, show them to nobody\n"
        f"next:\n"
        f"  fedserver run{where}\n"
        f"  fedserver token{where} alice > alice.token     # on alice's machine: fedclient enroll --token @alice.token"
    )


def run(
    folder: FolderOption = DEFAULT_FOLDER,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", metavar="ADDRESS", help="Address to listen on; default: server.toml.", show_default=False
        ),
    ] = None,
    port: PortOption = None,
    enrolment_port: EnrolmentPortOption = None,
    metrics_port: MetricsPortOption = None,
    log_level: LogLevelOption = "info",
    log_format: LogFormatOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Options go before what server.toml in the state folder says.
    """
    keep_memory()
    use_one_arena()  # before the modules below start threads

    import asyncio

    from fedcore.logs import configure
    from fedserver.cli.connect import announce, withdraw
    from fedserver.config import ServerConfig
    from fedserver.daemon import serve

    configure(log_level, log_format=log_format)
    config = _changed(
        ServerConfig.load(folder), host=host, port=port, enrolment_port=enrolment_port, metrics_port=metrics_port
    )
    is_ready = False

    def on_ready(ready: Ready) -> None:
        nonlocal is_ready
        announce(folder, ready)
        is_ready = True
        if as_json:
            print_json(
                {
                    "address": ready.address,
                    "enrolment_address": ready.enrolment_address,
                    "metrics_url": ready.metrics_url,
                }
            )
        else:
            typer.echo(
                f"serving at {ready.address}, enrolment at {ready.enrolment_address}, metrics at {ready.metrics_url}"
            )

    try:
        asyncio.run(serve(folder, config, on_ready))
    finally:
        if is_ready:  # else the file may be that of another server, which has the folder locked
            withdraw(folder)


def _changed(config: ServerConfig, **given: str | int | None) -> ServerConfig:
    """Return `config` with the options that were given.

    Raises:
        InvalidInput: an option is out of bounds.
    """
    from fedcore.params import parse_params

    values = {**config.model_dump(), **{name: value for name, value in given.items() if value is not None}}
    return parse_params(type(config), values, "server")
