"""docs/cli.md, docs/exit-codes.md and docs/status.md say what there is: nothing less, nothing more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fedclient.cli
import fedserver.cli
import fedsim.cli
from fedcore.errors import Exit
from fedcore.messages import Hello
from fedprivacy.accountant import guarantee
from fedprivacy.events import History, Unit
from fedserver.rounds.privacy import Spending
from fedserver.state.records import JobRecord, JobStatus, VersionRecord
from fedserver.status import history_of, status_of
from tests.support.server import running_server, small_job

DOCS = Path(__file__).resolve().parents[2] / "docs"
APPS = {"fedserver": fedserver.cli.app, "fedclient": fedclient.cli.app, "fedsim": fedsim.cli.app}


def options_of_commands() -> dict[str, set[str]]:
    """Return command → its options, as the programs have them."""
    found: dict[str, set[str]] = {}
    for program, app in APPS.items():
        root: Any = typer.main.get_command(app)
        commands = root.commands.items() if hasattr(root, "commands") else [(root.name, root)]
        for name, command in commands:
            options = [param for param in command.params if param.param_type_name == "option"]
            words = {word for option in options for word in (*option.opts, *option.secondary_opts)}
            found[f"{program} {name}"] = words - {"--help", "-h"}
    return found


def documented_options() -> dict[str, set[str]]:
    """Return command → its options, as docs/cli.md has them."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (`-.*?) \|", section, flags=re.MULTILINE)
        found[section.split("`")[1]] = {word for row in rows for word in re.findall(r"`(-[\w-]+)", row)}
    return found


def test_exactly_the_commands_and_options_there_are_are_documented() -> None:
    assert documented_options() == options_of_commands()


def test_every_command_is_in_the_overview() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for command in options_of_commands():
        assert f"| [`{command}`](#{command.replace(' ', '-')}) |" in text


def test_every_exit_code_has_a_section() -> None:
    text = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+): (\w+)$", text, flags=re.MULTILINE) == [(str(int(code)), code.name) for code in Exit]
    assert all(len(section.split()) > 5 for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:])


def keys_in(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from keys_in(value[0], f"{prefix}{key}.")
        elif isinstance(value, dict):
            yield from keys_in(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def documented_keys() -> dict[str, set[str]]:
    """Return section → keys, as docs/status.md has them."""
    sections = re.split(r"^## ", (DOCS / "status.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: set(re.findall(r"^\| `([\w.]+)` \|", section, flags=re.MULTILINE))
        for section in sections
    }


async def test_exactly_the_keys_of_a_status_are_documented(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        federation = server.federation
        spent = Spending(guarantee(History(unit=Unit.CLIENT), 1e-5), 0.0, None, None).as_json()
        job = JobRecord(
            "0" * 32, "done", small_job().to_json(), JobStatus.FINISHED, 1.0, 2.0, privacy=json.dumps(spent)
        )
        await federation.services.journal.write(job, VersionRecord("0" * 32, 0, "", "", b"", "", None, 1, 1, 1, 1, 2.0))
        ended = status_of(federation, 1, "done")
        (version,) = history_of(federation, "0" * 32)
        await federation.submit(small_job().to_json())
        federation.join("ann", Hello("test", "test", ("played",), ("full",), ("raw",)))
        while not (running := status_of(federation, 1, "small")["jobs"][0])["working"]:
            await federation.next_change().wait()
    documented = documented_keys()
    assert set(keys_in({**ended, "jobs": []})) == documented["The server"]
    # `evaluation` holds figures by name: the key itself is what is documented.
    assert set(version) == documented["A version"]
    # Of the guarantee, too, which is what `fedserver privacy` gives.
    of_private = {f"privacy.{key}" for key in ended["jobs"][0].pop("privacy")}
    assert set(keys_in(running)) - {"privacy"} | set(ended["jobs"][0]) | of_private == documented["A job"]


@pytest.mark.parametrize("arguments", ["--help", "--version", "run --help", "submit --help", "status --help"])
def test_help_of_the_server_imports_nothing_heavy(arguments: str) -> None:
    code = (
        "import sys; from fedcore.cli import run_app; from fedserver.cli import app\n"
        f"assert run_app(app, 'fedserver', {arguments.split()!r}) == 0\n"
        "print(sorted({'grpc', 'numpy', 'torch', 'cryptography', 'rich.live'} & set(sys.modules)),"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
