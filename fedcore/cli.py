"""What the commands `fedserver`, `fedclient` and `fedsim` have in common: one way to fail, one way to answer.

A command function returns nothing, or its exit code; it raises a `FedError` when it cannot go on. Answers go to
standard output; errors and logs go to standard error::

    app = new_app("What the program is for.")

    @app.command()
    def check(as_json: JsonOption = False) -> None: ...

    def main() -> NoReturn:
        sys.exit(run_app(app, "fedclient"))
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final

import typer

from fedcore.errors import Exit, FedError
from fedcore.logs import LogFormat

JsonOption = Annotated[bool, typer.Option("--json", help="Answer with JSON, errors too.")]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", help="Form of the log; auto: text on a terminal, else JSON."),
]
LogLevelOption = Annotated[str, typer.Option("--log-level", help="Least to log: debug, info, warning, error.")]


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(f"{context.find_root().info_name} {software_version()}")
        raise typer.Exit


_VersionOption = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
]

_log: Final = logging.getLogger(__name__)


def software_version() -> str:
    """Return the installed version; ``0+source`` when run from a source tree that was never installed."""
    try:
        return version("roundtable")
    except PackageNotFoundError:
        return "0+source"


def new_app(purpose: str) -> typer.Typer:
    """Return an empty set of commands with ``--help`` and ``--version``."""
    app = typer.Typer(
        help=purpose,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(help=purpose)
    def options(_version: _VersionOption = False) -> None:
        pass

    return app


def run_app(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; never raises for what users, peers or bugs do.

    A failure is one line ``error: text`` on standard error or, when ``--json`` is among the arguments,
    one object ``{"error": {"code": …, "exit_code": …, "text": …}}``. A bug (any other exception) goes to the log with
    its traceback.

    Args:
        app: the commands.
        program: its name, for messages.
        arguments: without the program's name; None takes those of the process.
    """
    # gRPC's C core writes to standard error by itself; an error is to be one line. Whoever wants it sets the variable.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        result = app(args=given or ["--help"], prog_name=program, standalone_mode=False)
    except FedError as error:
        return _fail(as_json, error.code, error.exit_code, str(error))
    except typer.TyperException as error:
        text = f"{error.format_message()} (`{program} --help` shows what there is)"
        return _fail(as_json, "usage", Exit.USAGE, text)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(as_json, "interrupted", Exit.INTERRUPTED, "interrupted")
    except Exception as error:  # noqa: BLE001 - the top of the program: whatever arrives here is a bug, and is logged
        _log.critical("internal error", exc_info=error)
        return _fail(as_json, "internal", Exit.INTERNAL, f"internal error: {type(error).__name__}: {error}")
    if not given:
        return Exit.USAGE
    return result if isinstance(result, int) else Exit.OK


def print_json(answer: Mapping[str, object]) -> None:
    """Print a command's answer as one JSON object on one line."""
    typer.echo(json.dumps(answer))


def _fail(as_json: bool, code: str, exit_code: Exit, text: str) -> int:
    if as_json:
        typer.echo(json.dumps({"error": {"code": code, "exit_code": int(exit_code), "text": text}}), err=True)
    else:
        # Several problems at once, as in a job file, get a line each.
        for line in text.splitlines() or [code]:
            typer.echo(f"error: {line}", err=True)
    return int(exit_code)
