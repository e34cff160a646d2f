"""The client daemon's composition root: from settings to a running client, and its end by signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from fedclient.adapters import ADAPTERS
from fedclient.guard import Guard
from fedclient.identity import ClientIdentity
from fedclient.ledger import FileLedger
from fedclient.policy import Policy, load_policy, policy_in
from fedclient.residuals import FileResiduals
from fedclient.tasks import TASKS
from fedcodec import CODECS
from fedcore.addresses import check_address
from fedcore.cli import software_version
from fedcore.clock import Clock, SystemClock
from fedcore.errors import ConfigError, Exit
from fedcore.messages import Hello

if TYPE_CHECKING:
    from fedclient.trainer import LocalWorker

MAX_THREADS: Final = 1024
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientSettings:
    """How to run a client.

    Attributes:
        folder: where `fedclient enroll` put the identity.
        data: this client's options for its tasks: where its data lies.
        task_files: Python files of the owner, each with one task.
        device: ``auto`` takes CUDA where there is any.
        threads: CPU threads for computing. More than one may change the last bits of results.
        server: HOST:PORT to dial instead of the one in the identity, such as a tunnel's end.
        policy: file of the policy; None: the one in the folder, if there is one.

    Raises:
        ConfigError: a value is out of bounds.
        InvalidInput: `server` is not an address.
    """

    folder: Path
    data: Mapping[str, str] = field(default_factory=dict)
    task_files: Sequence[Path] = ()
    device: str = "auto"
    threads: int = 1
    server: str | None = None
    policy: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads {self.threads}: 1 to {MAX_THREADS}")
        if self.server is not None:
            check_address(self.server, "server")


async def run_client(settings: ClientSettings) -> Exit:
    """Run until SIGTERM (0) or SIGINT (130); a second signal ends the process at once.

    Raises:
        FedError: the client cannot start, or the server does not accept it.
    """
    from fedclient.runner import ClientRunner
    from fedclient.transport.grpc_transport import GrpcTransport

    clock = SystemClock()
    identity = load_identity(settings, clock)
    guard = load_guard(settings, clock)
    for path in settings.task_files:
        from fedclient.tasks.files import load_task_file

        _log.info("task file loaded", extra={"file": str(path), "task": load_task_file(path)})
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker") as executor:
        worker = await asyncio.get_running_loop().run_in_executor(executor, make_worker, settings)
        about = Hello(
            software=f"roundtable {software_version()}",
            device=worker.device_description,
            tasks=tuple(TASKS.names()),
            adapters=tuple(ADAPTERS.names()),
            codecs=tuple(CODECS.names()),
        )
        transport = GrpcTransport(identity, clock, settings.server)
        runner = ClientRunner(
            transport,
            worker,
            identity.signing_key,
            about=about,
            clock=clock,
            executor=executor,
            # The jitter must differ between clients; nothing that is computed draws from it.
            rng=np.random.default_rng(),
            residuals=FileResiduals(settings.folder, identity.federation, identity.client),
            guard=guard,
        )
        signals = _Signals(runner.stop)
        _log.info(
            "client starts",
            extra={
                "client": identity.client,
                "server": settings.server or identity.server,
                "device": about.device,
            },
        )
        try:
            await runner.run()
        finally:
            signals.remove()
            await transport.close()
    _log.info("client ended")
    return signals.exit_code


def load_identity(settings: ClientSettings, clock: Clock) -> ClientIdentity:
    """Return the identity in the settings' folder, after a check that it is valid now.

    Raises:
        NotFound: there is none.
        StateUnusable: it is damaged.
        Unauthenticated: it is not, or no longer, valid.
    """
    identity = ClientIdentity.load(settings.folder)
    identity.check(clock.wall_s())
    return identity


def own_policy(settings: ClientSettings) -> Policy:
    """Return the policy of the settings' file or folder.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    return policy_in(settings.folder) if settings.policy is None else load_policy(settings.policy)


def load_guard(settings: ClientSettings, clock: Clock) -> Guard:
    """Return what keeps the client's policy and its ledger, after a look at both.

    Raises:
        ConfigError: the policy cannot be read or is wrong, or it needs dp-accounting, which is not installed.
        StateUnusable: the ledger is damaged.
    """
    ledger = FileLedger(settings.folder)
    guard = Guard(ledger, own_policy(settings), clock.wall_s)
    ledger.read()
    return guard


def make_worker(settings: ClientSettings) -> LocalWorker:
    """Return what computes; imports torch, which takes a second.

    Raises:
        ConfigError: torch is not installed, or there is no such device.
    """
    try:
        from fedclient.trainer import LocalWorker

        return LocalWorker(settings.data, settings.device, settings.threads)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError("a client needs torch: pip install 'roundtable[client]'") from error


class _Signals:
    """Turns the first SIGINT or SIGTERM into `stop`, and a second into the end of the process."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.exit_code = Exit.OK
        self._stop = stop
        self._seen = False
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal, number)

    def remove(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        code = Exit.INTERRUPTED if number is signal.SIGINT else Exit.OK
        if self._seen:
            # What a client writes is whole or not there, so there is nothing to tidy up.
            logging.shutdown()
            os._exit(code)
        self._seen = True
        self.exit_code = code
        _log.info("stopping", extra={"signal": number.name})
        self._stop()
