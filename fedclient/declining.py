"""What a client will not or cannot do, and how errors become that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedclient.trainer import Stopped
from fedcore.errors import FedError, StorageFailed

_log: Final = logging.getLogger(__name__)


class Declined(FedError):
    """The client will not or cannot do the work; the text goes to the operator."""

    code = "declined"


@contextmanager
def declining(*, tells: bool = True) -> Iterator[None]:
    """Turn what fails inside into a reason to decline: here the client meets code of its user.

    Args:
        tells: whether the reason has the text of an error in that code, which may quote the data.
    """
    try:
        yield
    except (Stopped, Declined, StorageFailed):
        raise
    except FedError as error:
        raise Declined(str(error)) from error
    except (Exception, SystemExit) as error:
        # A task is its owner's code and may fail in any way; the client outlives it and says what happened.
        _log.exception("task failed")
        text = f": {error}" if tells else "; its text is in this client's log, for the job is private"
        raise Declined(f"task failed: {type(error).__name__}{text}") from error
