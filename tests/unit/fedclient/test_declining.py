"""What the operator hears of work that fails: of a private job nothing that an error may quote of the data."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fedclient.clipping import CannotHide
from fedclient.declining import Declined, declining
from fedcore.errors import InvalidInput, LayoutError
from fedcore.jobfile import parse_job
from fedcore.messages import Assignment, WorkKind

SECRET = "Jane Doe, born 1970"
PRIVATE = {"mechanism": "dp-sgd", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "sampling": 0.1}


def assignment(privacy: dict[str, Any] | None) -> Assignment:
    tree: dict[str, Any] = {"job": {"name": "j", "rounds": 1}, "task": {"name": "t"}, "schedule": {"cohort": 1}}
    job = parse_job(tree if privacy is None else {**tree, "privacy": privacy}, "test")
    return Assignment("ab" * 16, "cd" * 16, job.to_json(), 0, WorkKind.TRAIN, 1, "", "", 0, 60.0)


def said(error: BaseException, privacy: dict[str, Any] | None) -> str:
    with pytest.raises(Declined) as caught, declining(assignment(privacy)):
        raise error
    return str(caught.value)


@pytest.mark.parametrize("error", [ValueError(SECRET), InvalidInput(SECRET), SystemExit(SECRET)])
def test_texts_of_errors_stay_with_the_client_of_a_private_job(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    assert SECRET in said(error, None)
    with caplog.at_level(logging.ERROR):
        text = said(error, PRIVATE)
    assert SECRET not in text
    assert type(error).__name__ in text
    assert SECRET in caplog.text


@pytest.mark.parametrize("error", [CannotHide("delta 0.1"), LayoutError("tensor x"), Declined("no")])
def test_what_is_not_of_the_data_is_said(error: Exception) -> None:
    assert said(error, PRIVATE) == str(error)


def test_a_job_that_cannot_be_read_says_why() -> None:
    broken = Assignment("ab" * 16, "cd" * 16, b"{}", 0, WorkKind.TRAIN, 1, "", "", 0, 60.0)
    with pytest.raises(Declined, match="why"), declining(broken):
        raise InvalidInput("why")
