from __future__ import annotations

import json
import logging

import pytest
import typer

from fedcore.cli import JsonOption, new_app, run_app
from fedcore.errors import Exit, FedError, JobFileError, NotFound, Unauthenticated


@pytest.fixture
def app() -> typer.Typer:
    app = new_app("A thing.")

    @app.command()
    def fail(kind: str, as_json: JsonOption = False) -> None:
        errors: dict[str, BaseException] = {
            "missing": NotFound("no job 7"),
            "revoked": Unauthenticated("revoked"),
            "job": JobFileError("a.toml", ["job.rounds: 0", "job.seed: -1"]),
            "bug": ZeroDivisionError("oops"),
            "ctrl-c": KeyboardInterrupt(),
        }
        raise errors[kind]

    @app.command()
    def answer(code: int) -> int:
        return code

    return app


@pytest.mark.parametrize(
    ("kind", "code"),
    [("missing", Exit.NOT_FOUND), ("revoked", Exit.REFUSED), ("job", Exit.INVALID), ("ctrl-c", Exit.INTERRUPTED)],
)
def test_an_error_becomes_its_exit_code(app: typer.Typer, kind: str, code: Exit) -> None:
    assert run_app(app, "thing", ["fail", kind]) == code


def test_an_error_is_one_line_on_standard_error(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    run_app(app, "thing", ["fail", "missing"])
    assert capsys.readouterr() == ("", "error: no job 7\n")


def test_every_problem_of_a_job_file_gets_a_line(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    run_app(app, "thing", ["fail", "job"])
    assert capsys.readouterr().err == "error: a.toml: job.rounds: 0\nerror: a.toml: job.seed: -1\n"


def test_with_json_an_error_is_an_object(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, "thing", ["fail", "revoked", "--json"]) == 9
    answer = json.loads(capsys.readouterr().err)
    assert answer == {"error": {"code": "unauthenticated", "exit_code": 9, "text": "revoked"}}


def test_a_bug_leaves_its_traceback_in_the_log_alone(
    app: typer.Typer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL):
        assert run_app(app, "thing", ["fail", "bug"]) == Exit.INTERNAL
    assert capsys.readouterr().err == "error: internal error: ZeroDivisionError: oops\n"
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("arguments", [[], ["nope"], ["fail"], ["fail", "job", "--nope"], ["answer", "x"]])
def test_wrong_usage_is_exit_code_2(app: typer.Typer, arguments: list[str]) -> None:
    assert run_app(app, "thing", arguments) == Exit.USAGE


def test_a_command_may_return_its_exit_code(app: typer.Typer) -> None:
    assert run_app(app, "thing", ["answer", "10"]) == Exit.JOB_FAILED


def test_version_and_help_succeed(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, "thing", ["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith("thing ")
    assert run_app(app, "thing", ["fail", "--help"]) == Exit.OK


def test_every_error_class_has_a_code_of_its_own() -> None:
    def tree(root: type[FedError]) -> list[type[FedError]]:
        return [root, *(found for child in root.__subclasses__() for found in tree(child))]

    codes = [error.code for error in tree(FedError) if error.__module__ == "fedcore.errors"]
    assert len(codes) == len(set(codes))
