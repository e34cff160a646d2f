"""A whole job in one process: the server's engine and the client's runner, unchanged, on virtual time.

What differs from a deployment: no network, no certificates (the simulator vouches for names), state in memory, and
one thread on which all clients compute in turn. The same job with the same seed, client names and data options gives
the same model bytes as the daemon with client processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, get_type_hints

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.adapters import ADAPTERS
from fedclient.guard import Guard
from fedclient.ledger import MemoryLedger
from fedclient.residuals import MemoryResiduals
from fedclient.runner import ClientRunner
from fedclient.tasks import TASKS
from fedclient.trainer import LocalWorker
from fedcodec import CODECS
from fedcore.cli import software_version
from fedcore.errors import JobFailed
from fedcore.jobfile import Job
from fedcore.messages import Hello
from fedcore.rng import stream
from fedserver.federation import Federation
from fedserver.initial.folder import OpenAdapter
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.services import Services
from fedserver.state.journal import Journal
from fedserver.state.memory import MemoryBlobs, MemoryStore
from fedserver.state.records import JobStatus, VersionRecord
from fedserver.status import history_of, status_of
from fedsim.clock import VirtualClock
from fedsim.transport import InProcessTransport

FEDERATION: Final = "simulation"
NUM_WORKERS: Final = 2

Tree = dict[str, Any]


@dataclass(frozen=True)
class SimulatedClient:
    """A client: its name and its local data options."""

    name: str
    data: Mapping[str, str]


@dataclass(frozen=True)
class Simulated:
    """What a simulated job leaves.

    Attributes:
        layout: of the state, as JSON.
        state: the last version's vector, raw little-endian float32.
        history: a row for each version (docs/status.md).
        status: as `fedserver status --json` shows the job.
        changes: what has led to the frozen matrices (`fedcore.changes`), the oldest first.
    """

    job_id: str
    layout: bytes
    version: VersionRecord
    state: bytes
    history: list[Tree]
    status: Tree
    changes: list[bytes]


def make_clients(job: Job, num_clients: int, data: Mapping[str, str]) -> list[SimulatedClient]:
    """Return clients ``client-1`` … for a job.

    A task whose options have ``shard`` and ``num_shards`` gets them: every client one shard, counted from 0. In the
    values of `data`, ``{shard}`` stands for the client's number.

    Raises:
        UnknownPlugin: the task is not installed.
    """
    known = get_type_hints(TASKS.get(job.task.name))["options"].model_fields
    clients: list[SimulatedClient] = []
    for shard in range(num_clients):
        own = {"shard": str(shard), "num_shards": str(num_clients)}
        options = {key: value for key, value in own.items() if key in known}
        options |= {key: value.replace("{shard}", str(shard)) for key, value in data.items()}
        clients.append(SimulatedClient(f"client-{shard + 1}", options))
    return clients


async def simulate(
    job: Job,
    clients: Sequence[SimulatedClient],
    *,
    device: str = "cpu",
    threads: int = 1,
    adapter: OpenAdapter | None = None,
    show: Callable[[Tree], None] = lambda _: None,
) -> Simulated:
    """Run a job to its end.

    Args:
        job: the job.
        clients: take part from the beginning.
        device: as for `fedclient run`.
        threads: of torch.
        adapter: to start from.
        show: gets the job's status (docs/status.md) after each change.

    Raises:
        JobFileError: the job cannot be run.
        InvalidInput: it cannot start from the adapter.
        JobFailed: it gave up; the text says why.
    """
    clock = VirtualClock(time.time())
    with (
        ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="worker") as workers,
        ThreadPoolExecutor(1, thread_name_prefix="training") as training,
    ):
        store = MemoryStore()
        journal = Journal(store, clock)
        services = Services(store, journal, MemoryBlobs(), Fleet(), clock, Metrics(now=clock.now_s), workers)
        keys = {client.name: _key(job, client) for client in clients}
        federation = Federation(
            services, FEDERATION, lambda name: keys[name].public_key().public_bytes_raw() if name in keys else None
        )
        runners = [
            ClientRunner(
                InProcessTransport(federation, client.name),
                LocalWorker(client.data, device, threads),
                keys[client.name],
                about=_about(),
                clock=clock,
                executor=training,
                rng=stream(job.job.seed, "jitter", client.name),
                residuals=MemoryResiduals(),
                guard=Guard(MemoryLedger()),
            )
            for client in clients
        ]
        try:
            async with _running(federation.run()):
                with clock.working():  # nobody is late to a job that has not begun
                    if adapter is not None:
                        services.blobs.put(adapter.weights, adapter.given.digest)
                    record = await federation.submit(job.to_json(), None if adapter is None else adapter.given)
                async with _running(*(runner.run() for runner in runners), clock.run()) as tasks:
                    await _follow(federation, record.job_id, tasks, show)
        finally:
            await journal.close()
        return _result(federation, record.job_id)


async def _follow(
    federation: Federation, job_id: str, tasks: Sequence[asyncio.Task[None]], show: Callable[[Tree], None]
) -> None:
    while job_id in federation.engines:
        change = asyncio.create_task(federation.next_change().wait())
        show(status_of(federation, len(federation.fleet.seats), job_id))
        await asyncio.wait({change, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        change.cancel()
        for task in tasks:
            if task.done():
                task.result()
                raise JobFailed("a simulated client ended before the job did")
    show(status_of(federation, len(federation.fleet.seats), job_id))


def _result(federation: Federation, job_id: str) -> Simulated:
    record = federation.job(job_id)
    if record.status is not JobStatus.FINISHED:
        raise JobFailed(f"job {record.name!r} {record.status.value}: {record.failure}")
    version = federation.version(job_id, None)
    return Simulated(
        job_id,
        record.layout or b"",
        version,
        b"".join(
            bytes(federation.services.vault.open(digest))
            for digest in (version.state_blob, version.basis_blob)
            if digest is not None
        ),
        history_of(federation, job_id),
        status_of(federation, 0, job_id)["jobs"][0],
        [bytes(federation.services.vault.open(digest)) for digest in federation.services.vault.changes(version)],
    )


def _key(job: Job, client: SimulatedClient) -> Ed25519PrivateKey:
    """Return a client's key; it follows from the job's seed, so that what clients draw in private repeats too."""
    return Ed25519PrivateKey.from_private_bytes(stream(job.job.seed, "signing key", client.name).bytes(32))


def _about() -> Hello:
    return Hello(software_version(), "simulated", tuple(TASKS.names()), tuple(ADAPTERS.names()), tuple(CODECS.names()))


@asynccontextmanager
async def _running(*coroutines: Any) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run `coroutines` beside the block, and end them with it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.sleep(0)
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
