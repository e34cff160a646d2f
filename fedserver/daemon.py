"""The server process: the one place where its parts are made and put together.

Constructors store, `serve` acts. It starts the state folder (locked), the journal, the ports and the federation, and
stops them in reverse order, so that nothing is taken in that could not be made durable.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.addresses import join_address
from fedcore.cli import software_version
from fedcore.clock import SystemClock
from fedcore.errors import FedError
from fedserver.config import ServerConfig
from fedserver.federation import Federation
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.metrics_endpoint import serve as serve_metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.services import Services
from fedserver.rpc.server import RpcServer
from fedserver.security.authority import Authority
from fedserver.state.folder import StateFolder
from fedserver.state.journal import Journal

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
NUM_WORKERS = 4
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Ready:
    """Where a server that has started can be reached."""

    address: str
    enrolment_address: str
    metrics_url: str


def initialise(folder: Path, config: ServerConfig, federation: str, hosts: Sequence[str] = ()) -> None:
    """Make a new state folder with its settings and its certificate authority.

    Args:
        folder: where; may exist if it is empty.
        config: goes into the folder.
        federation: the federation's name.
        hosts: names and IP addresses of the server besides `config.public_host` and this machine's own.

    Raises:
        InvalidInput: the federation's name or a host is not valid.
        StateUnusable: there is one already.
        StorageFailed: the operating system refused.
    """
    with StateFolder.create(folder, federation) as state:
        names = dict.fromkeys((config.public_host, *hosts, *LOCAL_HOSTS))
        Authority.create(state.keys, federation, list(names))
        config.save(folder)


async def serve(folder: Path, config: ServerConfig, on_ready: Callable[[Ready], None]) -> None:
    """Run until SIGINT or SIGTERM.

    Args:
        folder: made by `initialise`.
        config: usually `ServerConfig.load(folder)`.
        on_ready: called once, when every port listens.

    Raises:
        StateError: the state folder cannot be used, or storage failed meanwhile.
        AddressInUse: a port is taken.
    """
    clock = SystemClock()
    metrics = Metrics(now=clock.now_s, version=software_version())
    with ExitStack() as stack:
        state = stack.enter_context(StateFolder.open(folder))
        authority = Authority.load(state.keys)
        workers = stack.enter_context(ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="worker"))
        journal = Journal(
            state.store, clock, lambda records, seconds: metrics.journal_committed(records=records, seconds=seconds)
        )
        services = Services(state.store, journal, state.blobs, Fleet(), clock, metrics, workers)
        ready: list[Ready] = []
        membership = Membership(
            authority,
            state.federation,
            lambda: (ready[0].address, ready[0].enrolment_address),
            state.store,
            journal,
            clock,
            metrics,
            lambda client, reason: federation.cut(client, reason),  # noqa: PLW0108 - made below: each knows the other
        )
        federation = Federation(services, state.federation, membership.signing_key)
        rpc = RpcServer(federation, membership, metrics, authority, clock)

        async def listen() -> None:
            await rpc.start(config.host, config.port, config.enrolment_port)
            endpoint = stack.enter_context(serve_metrics(metrics, config.metrics_host, config.metrics_port))
            ready.append(
                Ready(
                    join_address(config.public_host, rpc.port),
                    join_address(config.public_host, rpc.enrolment_port),
                    endpoint.url,
                )
            )
            gc.freeze()  # what is there now stays: the collector need not look at it again
            log.info("serving", extra={"federation": state.federation, "address": ready[0].address})
            on_ready(ready[0])

        try:
            await _until_stopped(federation, (journal.failed, rpc.broken), listen, lambda: rpc.stop(STOP_GRACE_S))
        finally:
            await journal.close()
    log.info("stopped")


async def _until_stopped(
    federation: Federation,
    failures: Sequence[asyncio.Future[Any]],
    listen: Callable[[], Awaitable[None]],
    hang_up: Callable[[], Awaitable[None]],
) -> None:
    """Run the federation until a signal comes; `listen` once its jobs stand where they stood, `hang_up` before they go.

    Raises:
        FedError: one of `failures`, a job's engine, or `listen` failed.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    running = asyncio.create_task(federation.run())
    stopping = asyncio.create_task(stopped.wait())
    recovered = asyncio.create_task(federation.recovered.wait())
    ends: set[asyncio.Future[Any]] = {running, stopping, *failures}
    try:
        await asyncio.wait({recovered, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if not any(end.done() for end in ends):
            await listen()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for failure in failures:
            if failure.done():
                raise failure.result()
        if running.done():
            await running
    except* FedError as group:
        raise _first(group) from group
    finally:
        stopping.cancel()
        recovered.cancel()
        federation.close_sessions()
        await hang_up()  # before the jobs go, or an update that comes now would be told that it is too late
        running.cancel()
        await asyncio.wait({running})


def _first(group: BaseExceptionGroup[FedError]) -> FedError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FedError)
    return error
