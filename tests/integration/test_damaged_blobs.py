"""Bytes that changed on disk while the server was down: it does not start, says which, and leaves all as it is."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedcore.clock import SystemClock
from fedcore.errors import StateUnusable, UpdateResult
from fedcore.jobfile import parse_job
from fedcore.layout import Layout
from fedcore.messages import WorkKind
from fedserver.federation import Federation
from fedserver.metrics import Metrics
from fedserver.rounds.fleet import Fleet
from fedserver.rounds.services import Services
from fedserver.state.base import Store
from fedserver.state.blobs import FolderBlobs
from fedserver.state.journal import Journal
from fedserver.state.records import BlobRecord, JobStatus, Record, VersionRecord
from fedserver.state.vault import SMALL_BYTES
from fedsim.transport import InProcessTransport
from tests.support.player import RAW, Player, playing
from tests.support.server import FEDERATION, running_server, small_job

NUM_VALUES = SMALL_BYTES  # as bf16 twice as many bytes: nothing fits into the store
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "altered": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "longer": lambda data: data + b"x",
    "gone": lambda data: None,
}


async def answer(player: Player, num_values: int) -> WorkKind:
    """Do what the server wants, with an update that differs from client to client."""
    work = await player.next_work()
    layout = Layout.of([("adapter", "w", (num_values,), "float32")])
    values_D = np.full(num_values, len(player.transport.client), np.float32)
    frame = RAW.encode(values_D, np.random.default_rng(0))
    changes: dict[str, object] = {"layout_digest": layout.digest}
    if work.kind is WorkKind.INITIALISE:
        changes["layout"] = [[t.group, t.name, list(t.shape), t.dtype] for t in layout.tensors]
    state = await player.send(player.header(work, frame, **changes), frame)
    assert state.result is UpdateResult.ACCEPTED, state
    return work.kind


async def interrupted(folder: Path, num_values: int) -> tuple[Store, str]:
    """Run a job into the round to version 2, with one of two updates in; return the records and the job's id."""
    tree = small_job(cohort=2, rounds=3).model_dump(mode="json")
    tree["server_optimizer"] = {"name": "momentum"}
    tree["compression"]["downlink"] = [{"codec": "bf16"}]  # so that the frame is not the state
    (folder / "state").mkdir()
    async with running_server(folder, blobs=FolderBlobs(folder / "state")) as server, AsyncExitStack() as stack:
        record = await server.federation.submit(parse_job(tree, "job").to_json())
        players = []
        for name in ("ann", "berta"):
            transport, identity = InProcessTransport(server.federation, name), await server.enrol(name)
            players.append(await stack.enter_async_context(playing(transport, identity.signing_key)))
            if name == "ann":
                assert await answer(players[0], num_values) is WorkKind.INITIALISE
        for player in (*players, players[0]):
            assert await answer(player, num_values) is WorkKind.TRAIN
        return server.federation.services.store, record.job_id


@asynccontextmanager
async def second_life(folder: Path, store: Store, blobs: FolderBlobs | None = None) -> AsyncIterator[Federation]:
    clock = SystemClock()
    journal = Journal(store, clock)
    with ThreadPoolExecutor(2) as workers:
        blobs = blobs or FolderBlobs(folder / "state")
        yield Federation(
            Services(store, journal, blobs, Fleet(), clock, Metrics(), workers), FEDERATION, lambda client: None
        )
    await journal.close()


async def assert_goes_on(folder: Path, store: Store, job_id: str) -> None:
    async with second_life(folder, store) as federation:
        running = asyncio.create_task(federation.run())
        async with asyncio.timeout(20):
            await federation.recovered.wait()
        attempt = federation.engines[job_id].attempt
        assert attempt is not None
        assert (attempt.version, list(attempt.headers)) == (1, ["ann"])
        running.cancel()
        await asyncio.wait({running})


async def assert_refuses(folder: Path, store: Store, digest: str) -> None:
    async with second_life(folder, store) as federation:
        with pytest.RaisesGroup(pytest.RaisesExc(StateUnusable, match=digest)):
            async with asyncio.timeout(20):
                await federation.run()
        assert not federation.recovered.is_set(), "and nobody is let in"


def needed(store: Store, job_id: str) -> dict[str, str]:
    """Return the digests of all that the job goes on from."""
    version = store.latest_version(job_id)
    assert isinstance(version, VersionRecord)
    assert version.optimizer_blob is not None
    (update,) = store.updates(job_id, 1)
    assert update.blob is not None
    return {
        "state": version.state_blob,
        "frame": version.frame_body,
        "optimiser": version.optimizer_blob,
        "update": update.blob,
    }


async def test_a_damaged_blob_stops_the_start_until_it_is_mended(tmp_path: Path) -> None:
    store, job_id = await interrupted(tmp_path, NUM_VALUES)
    before = store.jobs(), store.attempts(job_id), store.updates(job_id, 1)
    digests = needed(store, job_id)
    assert len(set(digests.values())) == len(digests)
    for digest in digests.values():
        path = tmp_path / "state" / "blobs" / digest[:2] / digest
        data = path.read_bytes()
        for damage in DAMAGES.values():
            path.unlink()
            if (damaged := damage(data)) is not None:
                path.write_bytes(damaged)
            await assert_refuses(tmp_path, store, digest)
            path.write_bytes(data)
    assert (store.jobs(), store.attempts(job_id), store.updates(job_id, 1)) == before
    await assert_goes_on(tmp_path, store, job_id)


async def test_small_blobs_are_looked_at_too(tmp_path: Path) -> None:
    store, job_id = await interrupted(tmp_path, 5)
    for digest in needed(store, job_id).values():
        record = store.blob(digest)
        assert record is not None
        assert hashlib.sha256(record.data).hexdigest() == digest
        for name in ("cut", "altered"):
            store.write([BlobRecord(digest, DAMAGES[name](record.data) or b"")])
            await assert_refuses(tmp_path, store, digest)
        store.write([record])
    await assert_goes_on(tmp_path, store, job_id)


class HeldBlobs(FolderBlobs):
    """Blobs that are read when the test says so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.released = threading.Event()

    def read(self, digest: str, offset: int, num_bytes: int) -> bytes:
        assert self.released.wait(20)
        return super().read(digest, offset, num_bytes)


async def at_its_end(folder: Path) -> tuple[str, list[Record]]:
    """Return a job that only has to note that it has finished, and its records. None of its bytes are files."""
    async with running_server(folder) as server:
        job_id = (await server.federation.submit(small_job().to_json())).job_id
        transport, identity = InProcessTransport(server.federation, "ann"), await server.enrol("ann")
        async with playing(transport, identity.signing_key) as player:
            kind = None
            while kind is not WorkKind.EVALUATE:
                work = await player.next_work()
                assert (await player.answer(work)).result is UpdateResult.ACCEPTED
                kind = work.kind
            while job_id in server.federation.engines:
                await server.federation.next_change().wait()
        store = server.federation.services.store
        versions = store.versions(job_id)
        blobs = [store.blob(digest) for row in versions for digest in (row.state_blob, row.frame_body)]
        job = replace(server.federation.job(job_id), status=JobStatus.RUNNING, finished_at=None)
        return job_id, [job, *versions, *store.attempts(job_id), *(blob for blob in blobs if blob is not None)]


async def test_no_job_goes_on_before_all_have_been_looked_at(tmp_path: Path) -> None:
    for name in ("damaged", "other"):
        (tmp_path / name).mkdir()
    store, job_id = await interrupted(tmp_path / "damaged", NUM_VALUES)
    other_id, records = await at_its_end(tmp_path / "other")
    store.write(records)
    before = store.jobs()
    digest = needed(store, job_id)["state"]
    path = tmp_path / "damaged" / "state" / "blobs" / digest[:2] / digest
    data = path.read_bytes()
    path.unlink()
    blobs = HeldBlobs(tmp_path / "damaged" / "state")
    async with second_life(tmp_path / "damaged", store, blobs) as federation:
        running = asyncio.create_task(federation.run())
        async with asyncio.timeout(20):
            await asyncio.sleep(0)  # in which `run` makes its engines
            await federation.engines[other_id].recovered.wait()
            await federation.services.journal.write()  # what was written before is durable
            blobs.released.set()
            with pytest.RaisesGroup(pytest.RaisesExc(StateUnusable, match=digest)):
                await running
    assert store.jobs() == before
    path.write_bytes(data)
    await assert_goes_on(tmp_path / "damaged", store, job_id)
    other = store.job(other_id)
    assert other is not None
    assert other.status is JobStatus.FINISHED
