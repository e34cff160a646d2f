"""What gRPC says went wrong, as our own errors: mapped once, here.

The question that matters to a client is whether trying again makes sense. The server puts the permanent code of its
error into the trailing metadata (`ERROR_CODE_KEY`, and for a rejected update `ERROR_REASON_KEY`); the status decides
for errors that never came from our server: broken connections, proxies, foreign services.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, cast

import grpc
import grpc.aio

from fedcore.errors import (
    FedError,
    NotFound,
    Refused,
    Unauthenticated,
    Unreachable,
    UpdateRejected,
    UpdateResult,
)
from fedcore.messages import ERROR_CODE_KEY, ERROR_REASON_KEY

MAX_TEXT_CHARS: Final = 2000

STATUSES: Final[dict[grpc.StatusCode, type[FedError]]] = {
    grpc.StatusCode.OK: Unreachable,  # the call ended well, but without the answer that it owed
    grpc.StatusCode.CANCELLED: Unreachable,  # an overloaded server resets honest streams too
    grpc.StatusCode.UNKNOWN: Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unreachable,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.ABORTED: Unreachable,
    grpc.StatusCode.INTERNAL: Unreachable,  # also what a connection says that broke within a message
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unreachable,
    grpc.StatusCode.DATA_LOSS: Unreachable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: Refused,
    grpc.StatusCode.ALREADY_EXISTS: Refused,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.OUT_OF_RANGE: Refused,
    grpc.StatusCode.UNIMPLEMENTED: Refused,
}
# Where the server's own code says more than the status. Its other codes (a full disk, a locked state folder) tell
# a client nothing that the status does not.
_CODES: Final[dict[str, type[FedError]]] = {
    error.code: error for error in (Unauthenticated, Refused, NotFound, Unreachable)
}


def from_rpc_error(error: grpc.aio.AioRpcError) -> FedError:
    """Return our error for one of gRPC's. The text is the server's, or gRPC's where no server spoke."""
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    metadata = {key: value for key, value in trailing if isinstance(value, str)}
    text = (error.details() or error.code().name)[:MAX_TEXT_CHARS]
    code = metadata.get(ERROR_CODE_KEY, "")
    if code == UpdateRejected.code:
        reason = metadata.get(ERROR_REASON_KEY, "")
        known = reason in UpdateResult.__members__.values()
        return UpdateRejected(UpdateResult(reason) if known else UpdateResult.MALFORMED, text)
    return _CODES.get(code, STATUSES[error.code()])(text)


@contextmanager
def wire_errors(waiting_for: str) -> Iterator[None]:
    """Turn whatever a gRPC call raises inside the block into one of our errors.

    Args:
        waiting_for: what is not there if a timeout inside the block expires: ``"an answer"``.

    Raises:
        FedError: see `from_rpc_error`; timeouts, finished calls and a closed channel become `Unreachable`.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    except TimeoutError as error:
        raise Unreachable(f"waited too long for {waiting_for}") from error
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        raise Unreachable(f"the call was over before {waiting_for}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled us: gRPC says so when the channel was closed under the call.
        raise Unreachable(f"the connection was closed before {waiting_for}") from error
