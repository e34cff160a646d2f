"""What a client will not or cannot do, and how errors become that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedclient.clipping import CannotHide
from fedclient.trainer import Stopped
from fedcore.errors import FedError, FrameError, JobFileError, LayoutError, StorageFailed, UnknownPlugin
from fedcore.jobfile import Job
from fedcore.messages import Assignment

_log: Final = logging.getLogger(__name__)
_NOT_OF_DATA: Final = (CannotHide, FrameError, JobFileError, LayoutError, UnknownPlugin)
"""Whose texts are of the job, the wire and the model."""
_IN_THE_LOG: Final = "its text is in this client's log, for the job is private"


class Declined(FedError):
    """The client will not or cannot do the work; the text goes to the operator."""

    code = "declined"


@contextmanager
def declining(assignment: Assignment) -> Iterator[None]:
    """Turn what fails inside into a reason to decline: here the client meets code of its user.

    That code's errors may quote the data, so of a private job the operator hears their kind alone.
    """
    try:
        yield
    except (Stopped, Declined, StorageFailed):
        raise
    except FedError as error:
        if isinstance(error, _NOT_OF_DATA) or not _is_private(assignment):
            raise Declined(str(error)) from error
        _log.exception("work failed")
        raise Declined(f"{type(error).__name__}: {_IN_THE_LOG}") from error
    except (Exception, SystemExit) as error:
        # A task is its owner's code and may fail in any way; the client outlives it and says what happened.
        _log.exception("task failed")
        text = _IN_THE_LOG if _is_private(assignment) else str(error)
        raise Declined(f"task failed: {type(error).__name__}: {text}") from error


def _is_private(assignment: Assignment) -> bool:
    try:
        return Job.from_json(assignment.job).privacy is not None
    except JobFileError:
        return False  # nothing can be done for it, so nothing was read
