"""The catalogue: our errors → gRPC status. The one place where an exception becomes an answer."""

from __future__ import annotations

from typing import Final

import grpc

from fedcore import errors
from fedcore.messages import ERROR_CODE_KEY, ERROR_REASON_KEY

STATUS: Final[dict[type[errors.FedError], grpc.StatusCode]] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.UpdateRejected: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Refused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unreachable: grpc.StatusCode.UNAVAILABLE,
    errors.StateError: grpc.StatusCode.UNAVAILABLE,
    errors.AddressInUse: grpc.StatusCode.INTERNAL,
    errors.JobFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FedError: grpc.StatusCode.INTERNAL,
}
"""An error's status is that of its nearest ancestor here."""

# Storage and internal errors may name files of this machine; peers get this instead, the log has the rest.
_PRIVATE: Final = (errors.StateError, errors.AddressInUse)
INTERNAL_TEXT: Final = "the server failed; its log says why"


def status_of(error: errors.FedError) -> grpc.StatusCode:
    """Return the gRPC status that stands for `error`."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def public_text(error: errors.FedError) -> str:
    """Return what a peer may read of `error`, at most 1,000 characters."""
    return INTERNAL_TEXT if isinstance(error, _PRIVATE) else str(error)[:1000]


def trailing_metadata(error: errors.FedError) -> tuple[tuple[str, str], ...]:
    """Return the error's permanent code, and for an update the reason, for machines."""
    code = ((ERROR_CODE_KEY, error.code),)
    return (*code, (ERROR_REASON_KEY, error.reason.value)) if isinstance(error, errors.UpdateRejected) else code
