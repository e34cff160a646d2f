"""What the documents point to exists: commands, options, make targets, links, files.

Commands and exit codes are compared with docs/cli.md and docs/exit-codes.md in test_docs_of_commands.py, metrics and
job-file keys beside their code.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import fedclient.cli
import fedserver.cli
import fedsim.cli
from fedserver.rpc.errors import STATUS, status_of
from fedsim.summary import Summary

ROOT = Path(__file__).resolve().parents[2]
MADE = {"build", "demo", "dist", "simulated", "adapter", "fedserver-state"}  # by make, by the commands in README.md
PATHS = [
    path
    for path in ROOT.rglob("*.*")
    if path.is_file()
    and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in MADE
]
FILES = ["/" + path.relative_to(ROOT).as_posix() for path in PATHS]
DOCUMENTS = sorted(path for path in PATHS if path.suffix == ".md")
APPS = {"fedserver": fedserver.cli.app, "fedclient": fedclient.cli.app, "fedsim": fedsim.cli.app}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
ROOMS = (
    "aggregators/fedagg",
    "aggregators/fedagg/lowrank",
    "compression/fedcodec",
    "deploy",
    "examples/js_client",
    "examples/own_adapter",
    "examples/lm",
    "examples/own_task",
    "fedclient",
    "fedclient/adapters",
    "fedclient/tasks",
    "fedclient/tasks/hf",
    "fedcore",
    "fedprivacy",
    "fedserver",
    "fedserver/rounds",
    "fedserver/rpc",
    "fedserver/state",
    "fedsim",
    "proto",
    "tests",
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shell_lines(text: str) -> Iterator[str]:
    """Yield the commands of `sh` blocks, and those after a prompt in `console` blocks."""
    for _, language, block in FENCE.findall(text):
        for line in block.splitlines():
            if language == "sh":
                yield line.strip()
            elif language == "console" and line.startswith("$ "):
                yield line[2:]


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `program` in a document, also within pipes and loops."""
    for line in shell_lines(text):
        plain = re.sub(r"\$\(\(.*?\)\)", "0", line)  # arithmetic is a number
        lexer = shlex.shlex(plain, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        call: list[str] | None = None
        for word in [*lexer, ";"]:
            if call is not None and set(word) <= set("|&;<>"):
                # `2> file`: the number belongs to the shell.
                yield call[:-1] if word.startswith(">") and call[-1:] == ["2"] else call
                call = None
            elif call is not None:
                call.append(word)
            elif word == program:
                call = []


CALLS = [
    pytest.param(program, call, id=f"{named(document)}: {program} {' '.join(call)}")
    for document in DOCUMENTS
    for program in APPS
    for call in commands(document.read_text(encoding="utf-8"), program)
]


def test_the_readme_shows_the_whole_way() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {program: {call[0] for call in commands(text, program)} for program in APPS}
    assert shown == {
        "fedserver": {"init", "run", "token", "submit", "status", "export"},
        "fedclient": {"enroll", "run"},
        "fedsim": {"run", "compare"},
    }


@pytest.mark.parametrize(("program", "call"), CALLS)
def test_every_command_in_the_documents_is_understood(program: str, call: list[str]) -> None:
    group: Any = typer.main.get_command(APPS[program])
    assert call[0] in group.commands
    # Parses options and arguments, converts values, and runs nothing.
    group.commands[call[0]].make_context(call[0], call[1:])


def test_every_document_that_code_points_to_exists() -> None:
    modules = [path for path in PATHS if path.suffix in {".py", ".proto", ".toml"}]
    pointers = {
        (name, pointer)
        for name in map(named, modules)
        for pointer in re.findall(r"\b(?:docs|proto|deploy)/[\w/-]+\.md\b", (ROOT / name).read_text(encoding="utf-8"))
    }
    assert sorted(name for name, pointer in pointers if not (ROOT / pointer).exists()) == []


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        wanted = {*re.findall(r"`make ([a-z]+)", text), *re.findall(r"^make ([a-z]+)", text, re.MULTILINE)}
        assert sorted(wanted - targets) == [], named(document)


# -- links -----------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_and_every_file_that_it_names_exists(room: str) -> None:
    text = (ROOT / room / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# ")
    files = re.findall(r"`([\w./-]+\.(?:py|json|toml|proto|md))`", text)
    made = {"server.toml", "running.json", "identity.json"}  # in state folders
    missing = [name for name in files if name not in made and not any(path.endswith(f"/{name}") for path in FILES)]
    assert missing == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room.startswith("fed")])
def test_every_module_of_a_room_is_in_its_readme(room: str) -> None:
    text = (ROOT / room / "README.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / room).glob("*.py") if not path.name.startswith("__")]
    assert [name for name in modules if f"`{name}`" not in text] == []


def test_decisions_are_numbered_without_gaps_and_follow_the_template() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(len(records)))
    for path in records[1:]:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: ")
        for heading in ("Question", "Decision", "Consequences", "Not taken"):
            assert f"\n## {heading}\n" in text, named(path)


# -- tables that follow the code -------------------------------------------------------------------------------------


def table_keys(document: str) -> set[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def test_every_key_of_the_summary_is_explained() -> None:
    assert table_keys("docs/simulator.md") == {field.name for field in dataclasses.fields(Summary)}


def test_every_error_code_stands_beside_its_status() -> None:
    text = (
        (ROOT / "proto" / "README.md").read_text(encoding="utf-8").partition("## Errors")[2].partition("## Limits")[0]
    )
    documented = {
        (code, status)
        for codes, status in re.findall(r"^\| (`.*?) \| `([A-Z_]+)` \|", text, flags=re.MULTILINE)
        for code in re.findall(r"`([\w-]+)`", codes)
    }
    (root,) = [kind for kind in STATUS if kind.__name__ == "FedError"]
    kinds = [root]
    for kind in kinds:
        kinds += [child for child in kind.__subclasses__() if child.__module__ == root.__module__]
    assert documented == {(kind.code, status_of(kind.__new__(kind)).name) for kind in kinds}
