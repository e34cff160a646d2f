"""A real server inside the test's process: real ports, real mutual TLS, state in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fedclient.enroll import enroll
from fedclient.identity import ClientIdentity
from fedcore.clock import Clock, SystemClock
from fedcore.errors import Unauthenticated
from fedcore.identity import EnrolmentToken
from fedcore.jobfile import Job, parse_job
from fedserver.federation import Federation
from fedserver.membership import Membership
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.services import Services
from fedserver.rpc.server import RpcServer
from fedserver.security.authority import Authority
from fedserver.state.base import Blobs
from fedserver.state.journal import Journal
from fedserver.state.memory import MemoryBlobs, MemoryStore
from fedserver.state.records import Record

FEDERATION = "test-federation"


@dataclass
class TestServer:
    """The parts of a running server that tests reach into."""

    __test__ = False  # not a test class

    federation: Federation
    membership: Membership
    authority: Authority
    rpc: RpcServer
    folder: Path

    @property
    def address(self) -> str:
        return f"localhost:{self.rpc.port}"

    async def enrol(self, name: str) -> ClientIdentity:
        """Enrol a client over the wire."""
        token = EnrolmentToken.decode(await self.membership.issue_token(name, 600))
        return await enroll(token, self.folder / name, SystemClock(), force=True)


@asynccontextmanager
async def running_server(
    folder: Path, clock: Clock | None = None, *, found: Sequence[Record] = (), blobs: Blobs | None = None
) -> AsyncIterator[TestServer]:
    """Run a server whose store holds the records `found` from before."""
    clock = clock or SystemClock()
    metrics = Metrics(now=clock.now_s)
    authority = Authority.create(folder / "keys", FEDERATION, ["localhost", "127.0.0.1"])
    with ThreadPoolExecutor(2) as workers:
        store = MemoryStore()
        store.write(found)
        journal = Journal(store, clock)
        services = Services(store, journal, blobs or MemoryBlobs(), Fleet(), clock, metrics, workers)

        def cut(client: str, reason: Unauthenticated) -> None:
            federation.cut(client, reason)

        membership = Membership(
            authority,
            FEDERATION,
            lambda: (f"localhost:{rpc.port}", f"localhost:{rpc.enrolment_port}"),
            store,
            journal,
            clock,
            metrics,
            cut,
        )
        federation = Federation(services, FEDERATION, membership.signing_key)
        rpc = RpcServer(federation, membership, metrics, authority, clock)
        await rpc.start("127.0.0.1", 0, 0)
        running = asyncio.create_task(federation.run())
        recovered = asyncio.create_task(federation.recovered.wait())
        await asyncio.wait({recovered, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # raises: what it found cannot be used
        try:
            yield TestServer(federation, membership, authority, rpc, folder)
        finally:
            await rpc.stop(0)
            running.cancel()
            await asyncio.wait({running})
            await journal.close()


def small_job(cohort: int = 1, rounds: int = 1, deadline_s: float = 60.0, **schedule: object) -> Job:
    """Return a job for clients that are played by the test itself."""
    return parse_job(
        {
            "job": {"name": "small", "rounds": rounds, "seed": 3},
            "task": {"name": "played"},
            "schedule": {"cohort": cohort, "deadline_s": deadline_s, **schedule},
        },
        "small_job",
    )
