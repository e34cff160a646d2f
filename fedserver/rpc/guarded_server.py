"""gRPC's server, without the method path that would end it, and without tracebacks for what callers do.

The asyncio server of grpcio (up to 1.85.1 at least) decodes the path of a call as UTF-8 in the very task that accepts
calls, unless it is the path of a registered method. One request with other bytes there ends that task, and with it the
port, for everybody. Here such calls are answered before anybody reads their path. The methods of generated services are
registered, so theirs never come this way. gRPC has no public door to this, so the class behind its server is replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import grpc
from grpc import aio
from grpc._cython.cygrpc import AioServer, _schedule_rpc_coro, _ServicerContext  # type: ignore[import-not-found]

# Logged by gRPC with a traceback: a caller that left while it was written to, and headers that are no text.
_CALLERS_DOING: Final = ("ExecuteBatchError raised in core", "Invalid encoding on")
NO_SUCH_METHOD: Final = "Method not found!"  # what gRPC itself says


class _RegisteredOnly(AioServer):  # type: ignore[misc]  # it has no stubs
    async def _request_call(self) -> NoReturn:
        """Answer every call whose method is not registered. The loop that accepts calls waits here for ever."""
        loop = asyncio.get_running_loop()
        answers: set[asyncio.Task[None]] = set()
        while True:
            call = await super()._request_call()
            answer = loop.create_task(_schedule_rpc_coro(_refuse(call), call, loop, "unknown"))
            answers.add(answer)
            answer.add_done_callback(answers.discard)


def guarded_server(interceptors: Sequence[Any], options: Mapping[str, int]) -> aio.Server:
    """Return a server as `grpc.aio.server` makes it, of which no request can end the port."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
    server = aio.server()
    loop = asyncio.get_running_loop()
    server._server = _RegisteredOnly(loop, None, (), tuple(interceptors), tuple(options.items()), None)  # type: ignore[attr-defined]  # noqa: SLF001
    return server


async def _refuse(call: object) -> None:
    context = _ServicerContext(call, None, None, asyncio.get_running_loop())
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_SUCH_METHOD)


def _is_ours(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CALLERS_DOING)
