"""What stands before every handler: who is it, may it call this, is its message one, and what an exception turns into.

An interceptor, so a handler cannot be reached around it, nor forget it. A service without a role in `ROLES` is closed.
Every request is taken as a stream here, for on the wire a single message is a stream of one: so a caller is admitted
before its message is read, and has a deadline for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from fedcore.clock import Clock
from fedcore.errors import Busy, FedError, InvalidInput, Refused, Unauthenticated
from fedcore.identity import Role
from fedcore.messages import CHUNK_BYTES, MESSAGE_BYTES
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rpc import errors
from fedserver.rpc.patience import first_message
from fedserver.rpc.unknown_fields import refuse_unknown_fields
from fedserver.security.access import Caller

log = logging.getLogger(__name__)

ROLES: Final[dict[str, Role | None]] = {
    "fedproto.v1.EnrolmentService": None,  # the caller has no certificate yet: its token is checked by the handler
    "fedproto.v1.ClientService": Role.CLIENT,
    "fedproto.v1.OperatorService": Role.OPERATOR,
}

MAX_CALLS: Final = 8
"""Open calls of one client: a session, a transfer, and those that lost connections have left behind."""

ENVELOPE_BYTES: Final = 16 << 10
"""What a message may have beyond a chunk, or beyond header and frame of a small update."""
MAX_MESSAGE_BYTES: Final = MESSAGE_BYTES + ENVELOPE_BYTES
METHOD_BYTES: Final = {
    "Upload": CHUNK_BYTES + ENVELOPE_BYTES,
    "PutAdapter": CHUNK_BYTES + ENVELOPE_BYTES,
    "GetUpload": 1 << 10,
    "Download": 1 << 10,
}
"""By method, where a message is smaller. A larger one is refused before it is parsed, which takes more memory still."""

MAX_METADATA_BYTES: Final = 16 * 1024
"""gRPC's own limit, which it does not hold a peer to that never acknowledges its settings."""
MAX_LOGGED_CHARS: Final = 1000

_caller: ContextVar[Caller] = ContextVar("caller")
_check: ContextVar[Callable[[], Caller]] = ContextVar("check")

Context = aio.ServicerContext[Any, Any]
Take = Callable[[AsyncIterator[Any]], Awaitable[Any]]
_ARITY: Final = {False: "unary", True: "stream"}


def caller_name() -> str:
    """Return the name in the certificate of whoever makes the current call."""
    return _caller.get().identity.name


def check_again() -> None:
    """Admit the current caller once more: streams call this for each message, so that revocation cuts them.

    Raises:
        Unauthenticated: it has been revoked or its certificate has expired since.
        Unreachable: the server's clock was set back to before its certificate.
    """
    _check.get()()


class Gatekeeper(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """See the module's text."""

    def __init__(self, membership: Membership, metrics: Metrics, clock: Clock) -> None:
        self._membership = membership
        self._metrics = metrics
        self._clock = clock
        self._open_calls: Counter[str] = Counter()  # by client

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler, whichever of the four kinds it is."""
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return None
        num_bytes = sum(len(name) + len(value) for name, value in handler_call_details.invocation_metadata)
        replies = _ARITY[handler.response_streaming]
        call = getattr(handler, f"{_ARITY[handler.request_streaming]}_{replies}")
        take = self._in_time if handler.request_streaming else self._only_message
        wrap = self._stream if handler.response_streaming else self._single
        make = getattr(grpc, f"stream_{replies}_rpc_method_handler")
        serialize = (
            _emptying(handler.response_serializer) if handler.response_streaming else handler.response_serializer
        )
        parse = _strict(handler.request_deserializer, METHOD_BYTES.get(method.rpartition("/")[2], MAX_MESSAGE_BYTES))
        return make(wrap(method, num_bytes, take, call), parse, serialize)

    def _single(
        self, method: str, num_bytes: int, take: Take, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[..., Any]:
        async def wrapped(requests: AsyncIterator[Any], context: Context) -> Any:
            try:
                self._admit(method, num_bytes, context)
                return await call(await take(requests), context)
            except FedError as error:
                await self._abort(method, context, error)

        return wrapped

    def _stream(
        self, method: str, num_bytes: int, take: Take, call: Callable[[Any, Context], AsyncIterator[Any]]
    ) -> Callable[..., Any]:
        async def wrapped(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            try:
                self._admit(method, num_bytes, context)
                async for reply in call(await take(requests), context):
                    box = [reply]
                    del reply
                    yield box
            except FedError as error:
                await self._abort(method, context, error)

        return wrapped

    async def _only_message(self, requests: AsyncIterator[Any]) -> Any:
        request = await first_message(requests, self._clock)
        if request is None:
            raise InvalidInput("a call without a message")
        return request

    async def _in_time(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async def messages() -> AsyncIterator[Any]:
            request = await first_message(requests, self._clock)
            while request is not None:
                yield request
                request = None  # not held while the next one is on its way
                request = await anext(requests, None)

        return messages()

    def _admit(self, method: str, num_bytes: int, context: Context) -> None:
        if num_bytes > MAX_METADATA_BYTES:
            raise InvalidInput(f"metadata of {num_bytes} bytes, at most {MAX_METADATA_BYTES}")
        service = method.split("/")[1]
        if service not in ROLES:
            raise Refused(f"service {service!r} is closed")
        role = ROLES[service]
        if role is None:
            return

        certificates = list(context.auth_context().get("x509_pem_cert", ()))
        if len(certificates) != 1:
            raise Unauthenticated("no client certificate")

        def check() -> Caller:
            caller = self._membership.admit(certificates[0])
            if caller.identity.role is not role:
                raise Unauthenticated(
                    f"{service} is for the role {role.value}, the certificate is for {caller.identity.role.value}"
                )
            return caller

        caller = check()
        _caller.set(caller)
        _check.set(check)
        if role is Role.CLIENT:
            self._count(caller.identity.name, context)

    def _count(self, client: str, context: Context) -> None:
        """Count a call as open until it is over.

        Raises:
            Busy: the client has `MAX_CALLS` open.
        """
        if self._open_calls[client] >= MAX_CALLS:
            raise Busy(f"{client!r} has {MAX_CALLS} calls open, at most that many are served at a time")
        self._open_calls[client] += 1

        def over(_: Any) -> None:
            self._open_calls[client] -= 1
            if not self._open_calls[client]:
                del self._open_calls[client]

        context.add_done_callback(over)  # type: ignore[arg-type]  # what the stubs want is no callable

    async def _abort(self, method: str, context: Context, error: FedError) -> None:
        self._metrics.rpc_errors.labels(error.code).inc()
        log.warning(
            "call refused",
            extra={"method": method, "code": error.code, "text": str(error)[:MAX_LOGGED_CHARS], "peer": context.peer()},
        )
        context.set_trailing_metadata(errors.trailing_metadata(error))
        try:
            await context.abort(errors.status_of(error), errors.public_text(error))
        except aio.InternalError as gone:  # the caller has, or gRPC has refused its message: nobody waits for an answer
            raise asyncio.CancelledError from gone


def _emptying(serialize: Callable[[Any], bytes]) -> Callable[[list[Any]], bytes]:
    """Return a serializer of a box with one reply, which it empties.

    gRPC holds what a stream has yielded until the next reply: a session would keep its assignment, with all of its
    frame, for as long as its client trains.
    """
    return lambda box: serialize(box.pop())


def _strict(parse: Callable[[bytes], Any], max_bytes: int) -> Callable[[bytes], Any]:
    """Return a parser that says in our own words what is wrong with a message."""

    def parsed(data: bytes) -> Any:
        if len(data) > max_bytes:
            raise InvalidInput(f"message of {len(data)} bytes, at most {max_bytes}")
        try:
            message = parse(data)
        except DecodeError as error:
            raise InvalidInput(str(error)) from error
        refuse_unknown_fields(data, message.DESCRIPTOR)
        return message

    return parsed
