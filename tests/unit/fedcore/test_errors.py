"""The exception tree: as drawn, with permanent codes and documented exit codes."""

from __future__ import annotations

import re

import pytest

import fedcore.errors
from fedcore.errors import Exit, FedError, InvalidInput, JobFileError, StateError, UpdateRejected, UpdateResult


def tree(root: type[FedError]) -> dict[str, str]:
    """Return class name → parent name of everything in fedcore.errors below `root`."""
    found: dict[str, str] = {}
    for child in root.__subclasses__():
        if child.__module__ == fedcore.errors.__name__:
            found[child.__name__] = root.__name__
            found |= tree(child)
    return found


def drawn() -> dict[str, str]:
    """Return class name → parent name as the module's text draws them."""
    assert fedcore.errors.__doc__ is not None
    found: dict[str, str] = {}
    path = ["FedError"]
    for line in fedcore.errors.__doc__.splitlines():
        if match := re.match(r"([│ ]*)[├└]── (\w+)", line):
            depth = len(match[1]) // 4 + 1
            path = [*path[:depth], match[2]]
            found[match[2]] = path[-2]
    return found


def every_error() -> list[type[FedError]]:
    return [FedError, *(getattr(fedcore.errors, name) for name in tree(FedError))]


def test_the_drawing_shows_the_tree_that_is_there() -> None:
    assert drawn() == tree(FedError)


def test_codes_are_unique_and_set_by_each_class_itself() -> None:
    codes = [error.code for error in every_error()]
    assert len(set(codes)) == len(codes)
    assert all("code" in vars(error) for error in every_error())
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_no_error_exits_as_success_or_as_interrupted() -> None:
    assert {error.exit_code for error in every_error()}.isdisjoint({Exit.OK, Exit.USAGE, Exit.INTERRUPTED})


def test_exit_codes_are_permanent() -> None:
    assert {exit_code.name: exit_code.value for exit_code in Exit} == {
        "OK": 0,
        "INTERNAL": 1,
        "USAGE": 2,
        "INVALID": 3,
        "NOT_FOUND": 4,
        "UNREACHABLE": 5,
        "ADDRESS_IN_USE": 6,
        "STATE_LOCKED": 7,
        "STATE_UNUSABLE": 8,
        "REFUSED": 9,
        "JOB_FAILED": 10,
        "STORAGE_FAILED": 11,
        "INTERRUPTED": 130,
    }


def test_every_exit_code_but_those_of_the_shell_belongs_to_an_error() -> None:
    raised = {error.exit_code for error in every_error()}
    assert raised == set(Exit) - {Exit.OK, Exit.USAGE, Exit.INTERRUPTED}


def test_invalid_input_is_a_value_error_and_nothing_else_is() -> None:
    for error in every_error():
        assert issubclass(error, ValueError) == issubclass(error, InvalidInput)


def test_state_errors_are_caught_together() -> None:
    assert {name for name, parent in tree(FedError).items() if parent == "StateError"} == {
        "StateLocked",
        "StateUnusable",
        "StorageFailed",
    }
    assert issubclass(StateError, FedError)


def test_job_file_error_puts_the_file_before_every_problem() -> None:
    error = JobFileError("a.toml", ["job.name: is required", "schedule: is required"])
    assert str(error) == "a.toml: job.name: is required\na.toml: schedule: is required"
    assert error.problems == ["job.name: is required", "schedule: is required"]


def test_rejected_update_keeps_its_reason() -> None:
    error = UpdateRejected(UpdateResult.TOO_LATE, "version 3 has closed")
    assert error.reason is UpdateResult.TOO_LATE
    assert str(error) == "version 3 has closed"


@pytest.mark.parametrize("result", UpdateResult)
def test_update_results_are_words_that_fit_a_metric_label(result: UpdateResult) -> None:
    assert result.value == result.name.lower().replace("_", "-")
