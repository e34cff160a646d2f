"""gRPC status → our errors, on the operator's side: the inverse of `fedserver.rpc.errors`.

The server's permanent code decides, so that a command exits as if it had met the error itself. Where no server spoke,
the status decides. (`fedclient.transport.errors` asks another question: whether trying again makes sense.)
"""

from __future__ import annotations

import re
from typing import Final, cast

import grpc

from fedcore import errors
from fedcore.messages import ERROR_CODE_KEY

CODES: Final[dict[str, type[errors.FedError]]] = {
    kind.code: kind
    for kind in (
        errors.FedError,
        errors.InvalidInput,
        errors.ConfigError,
        errors.UnknownPlugin,
        errors.LayoutError,
        errors.FrameError,
        errors.NotFound,
        errors.Refused,
        errors.Unauthenticated,
        errors.Unreachable,
        errors.Busy,
        errors.StateError,
        errors.StateLocked,
        errors.StateUnusable,
        errors.StorageFailed,
        errors.AddressInUse,
        errors.JobFailed,
    )
} | {
    # These two carry more than a text; to an operator the text is what matters.
    errors.JobFileError.code: errors.InvalidInput,
    errors.UpdateRejected.code: errors.Refused,
}

STATUSES: Final[dict[grpc.StatusCode, type[errors.FedError]]] = {
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Unauthenticated,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Refused,
    grpc.StatusCode.UNIMPLEMENTED: errors.Refused,
    grpc.StatusCode.UNKNOWN: errors.FedError,  # a bug in a handler: its log has the traceback
}
"""Every other status means that nobody answered."""

_MAX_CHARS: Final = 2000
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the newline
_REASONS: Final = {
    "connection refused": "connection refused",
    "no route to host": "no route to host",
    "certificate verify failed": "its certificate is not of this federation, or not for this name",
    "hostname verification": "its certificate is not for this name",
    "peer name": "its certificate is not for this name",
    "handshake": "the TLS handshake failed, as between two federations",
    "resolution": "the name is unknown",
    "timed out": "no answer in time",
    "deadline exceeded": "no answer in time",
}


def from_rpc_error(error: grpc.RpcError, address: str) -> errors.FedError:
    """Return our error for one of gRPC's; the text is the server's, or says what keeps us from it."""
    call = cast("grpc.Call", error)  # what a call raises is the call itself
    metadata = dict(call.trailing_metadata() or ())
    text = _CONTROL.sub("?", call.details() or call.code().name)[:_MAX_CHARS]
    if (kind := CODES.get(str(metadata.get(ERROR_CODE_KEY, "")))) is not None:
        return kind(text)
    kind = STATUSES.get(call.code(), errors.Unreachable)
    if kind is not errors.Unreachable:
        return kind(f"the server at {address} answered: {text}")
    reason = next((words for mark, words in _REASONS.items() if mark in text.lower()), text[:200])
    return errors.Unreachable(f"no answer from {address}: {reason}; does `fedserver run` run there?")
