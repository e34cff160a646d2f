"""What stands before every handler: who is it, may it call this, and what an exception turns into.

An interceptor, so a handler cannot be reached around it, nor forget it. A service without a role in `ROLES` is closed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

import grpc
from grpc import aio

from fedcore.errors import FedError, Refused, Unauthenticated
from fedcore.identity import Role
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rpc import errors
from fedserver.security.access import Caller

log = logging.getLogger(__name__)

ROLES: Final[dict[str, Role | None]] = {
    "fedproto.v1.EnrolmentService": None,  # the caller has no certificate yet: its token is checked by the handler
    "fedproto.v1.ClientService": Role.CLIENT,
    "fedproto.v1.OperatorService": Role.OPERATOR,
}

_caller: ContextVar[Caller] = ContextVar("caller")
_check: ContextVar[Callable[[], Caller]] = ContextVar("check")

Context = aio.ServicerContext[Any, Any]
_ARITY: Final = {False: "unary", True: "stream"}


def caller_name() -> str:
    """Return the name in the certificate of whoever makes the current call."""
    return _caller.get().identity.name


def check_again() -> None:
    """Admit the current caller once more: streams call this for each message, so that revocation cuts them.

    Raises:
        Unauthenticated: it has been revoked or its certificate has expired since.
    """
    _check.get()()


class Gatekeeper(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """See the module's text."""

    def __init__(self, membership: Membership, metrics: Metrics) -> None:
        self._membership = membership
        self._metrics = metrics

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
        wrap = self._stream if handler.response_streaming else self._single
        kind = f"{_ARITY[handler.request_streaming]}_{_ARITY[handler.response_streaming]}"
        wrapped = wrap(method, getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _single(self, method: str, call: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Any]:
        async def wrapped(request: Any, context: Context) -> Any:
            try:
                self._admit(method, context)
                return await call(request, context)
            except FedError as error:
                await self._abort(method, context, error)

        return wrapped

    def _stream(self, method: str, call: Callable[[Any, Context], AsyncIterator[Any]]) -> Callable[[Any, Context], Any]:
        async def wrapped(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                self._admit(method, context)
                async for reply in call(request, context):
                    yield reply
            except FedError as error:
                await self._abort(method, context, error)

        return wrapped

    def _admit(self, method: str, context: Context) -> None:
        service = method.split("/")[1]
        if service not in ROLES:
            raise Refused(f"service {service!r} is closed")
        role = ROLES[service]
        if role is None:
            return

        def check() -> Caller:
            certificates = list(context.auth_context().get("x509_pem_cert", ()))
            if len(certificates) != 1:
                raise Unauthenticated("no client certificate")
            caller = self._membership.admit(certificates[0])
            if caller.identity.role is not role:
                raise Unauthenticated(
                    f"{service} is for the role {role.value}, the certificate is for {caller.identity.role.value}"
                )
            return caller

        _caller.set(check())
        _check.set(check)

    async def _abort(self, method: str, context: Context, error: FedError) -> None:
        self._metrics.rpc_errors.labels(error.code).inc()
        log.warning(
            "call refused", extra={"method": method, "code": error.code, "text": str(error), "peer": context.peer()}
        )
        context.set_trailing_metadata(errors.trailing_metadata(error))
        await context.abort(errors.status_of(error), errors.public_text(error))
