"""A job that starts from an adapter: how the weights come, what is refused, and what version 0 holds."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedcore.adapters import PEFT_PREFIX
from fedcore.errors import FedError, InvalidInput, NotFound, StateUnusable, Unauthenticated, Unreachable, UpdateResult
from fedcore.layout import BASIS_GROUP, Layout
from fedcore.messages import CHUNK_BYTES, WorkKind
from fedserver.initial import uploads as adapter_uploads
from fedserver.initial.adapter import GivenAdapter
from fedserver.initial.uploads import AdapterUploads
from fedserver.rounds.plan import make_plan
from fedserver.rounds.recovery import recover
from fedserver.rpc.operator_client import OperatorClient
from fedserver.state.base import Bytes
from fedserver.state.memory import MemoryBlobs, MemorySpool
from fedserver.state.records import JobRecord, JobStatus
from fedserver.status import status_of
from fedsim.transport import InProcessTransport
from tests.support.adapters import SIDES, Tensors, config, factors, job_with, layout_of
from tests.support.crew import Member
from tests.support.player import HELLO, RAW, playing
from tests.support.server import TestServer, running_server
from tests.unit.fedserver.test_federation import ended
from tests.unit.fedserver.test_operator_client import ask

WEIGHTS = bytes(range(256)) * 10_000  # three chunks
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
PLAYED = replace(HELLO, adapters=("lora", "ffa-lora"))


async def at_once(call: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(call)


def send(weights: bytes = WEIGHTS, digest: str | None = None, seen: list[int] | None = None) -> Callable[..., None]:
    found = hashlib.sha256(weights).hexdigest() if digest is None else digest
    on_bytes = (lambda total: None) if seen is None else seen.append
    return lambda client: client.put_adapter(found, memoryview(weights), on_bytes)


# -- the way of the weights ------------------------------------------------------------------------------------------


async def test_weights_of_many_chunks_arrive_whole_and_are_not_sent_again(tmp_path: Path) -> None:
    first: list[int] = []
    again: list[int] = []
    async with running_server(tmp_path) as server:
        blobs = server.federation.services.blobs
        await ask(server, send(seen=first))
        assert blobs.open(DIGEST) == WEIGHTS
        assert blobs.spools() == {}
        await ask(server, send(seen=again))
    assert first == [0, CHUNK_BYTES, 2 * CHUNK_BYTES, len(WEIGHTS)]
    assert again[-1] == len(WEIGHTS)


async def test_a_transfer_that_breaks_goes_on_where_it_was_and_gives_up_when_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[int] = []
    append = AdapterUploads.append
    stuck = False

    async def broken(self: AdapterUploads, digest: str, num_bytes: int, offset: int, data: Bytes) -> None:
        if stuck:
            raise Unreachable("the line broke")
        await append(self, digest, num_bytes, offset, data)
        offsets.append(offset)
        raise Unreachable("the line broke")

    monkeypatch.setattr(AdapterUploads, "append", broken)
    async with running_server(tmp_path) as server:
        await ask(server, send())
        assert server.federation.services.blobs.open(DIGEST) == WEIGHTS
        assert offsets == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
        stuck = True
        with pytest.raises(Unreachable, match="the line broke"):
            await ask(server, send(b"other"))


async def test_other_bytes_than_announced_are_refused_and_forgotten(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        for _ in range(2):
            with pytest.raises(InvalidInput, match=f"adapter {DIGEST}: what arrived has SHA-256"):
                await ask(server, send(b"other", DIGEST))
        assert server.federation.services.blobs.spools() == {}
        await ask(server, send())


async def test_a_client_cannot_send_an_adapter(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        ann = await server.enrol("ann")

        def asked() -> None:
            pems = {"ca_pem": ann.ca_pem, "certificate_pem": ann.certificate_pem, "key_pem": ann.key_pem}
            with OperatorClient(server.address, **pems) as client:
                send()(client)

        with pytest.raises(Unauthenticated, match="is for the role operator"):
            await asyncio.to_thread(asked)


async def test_what_is_announced_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = MemoryBlobs()
    held = blobs.put(b"12345")
    intake = AdapterUploads(blobs, at_once)
    assert await intake.held(held, 5) == 5
    with pytest.raises(InvalidInput, match="has 5 bytes, announced are 6"):
        await intake.held(held, 6)
    for digest in ("../x", DIGEST.upper(), ""):
        with pytest.raises(InvalidInput, match="is not a SHA-256"):
            await intake.held(digest, 5)
    monkeypatch.setattr(adapter_uploads, "MAX_ADAPTER_BYTES", 10)
    for num_bytes in (0, 11):
        with pytest.raises(InvalidInput, match="bytes, expected 1 to 10"):
            await intake.held(DIGEST, num_bytes)
    assert await intake.held(DIGEST, 10) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (6, 1), (5, 6)])
async def test_a_chunk_out_of_its_place_is_refused_and_changes_nothing(offset: int, size: int) -> None:
    intake = AdapterUploads(MemoryBlobs(), at_once)
    await intake.append(DIGEST, 10, 0, b"12345")
    with pytest.raises(InvalidInput, match=f"chunk of bytes {offset} to {offset + size}, expected one from 5 to at"):
        await intake.append(DIGEST, 10, offset, bytes(size))
    assert await intake.held(DIGEST, 10) == 5


async def test_a_chunk_whose_connection_breaks_while_it_is_written_is_taken_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    append = MemorySpool.append

    def slowly(spool: MemorySpool, data: Bytes) -> None:
        writing.set()
        assert go_on.wait(20)
        append(spool, data)

    monkeypatch.setattr(MemorySpool, "append", slowly)
    intake = AdapterUploads(MemoryBlobs(), at_once)
    broken = asyncio.create_task(intake.append(DIGEST, 10, 0, b"12345"))
    assert await asyncio.to_thread(writing.wait, 20)
    broken.cancel()
    await asyncio.gather(broken, return_exceptions=True)
    resuming = asyncio.create_task(intake.held(DIGEST, 10))
    await asyncio.sleep(0)
    assert not resuming.done()
    go_on.set()
    assert await resuming == 5


# -- submission ------------------------------------------------------------------------------------------------------


async def given(server: TestServer, tensors: Tensors | None = None, **changes: Any) -> GivenAdapter:
    weights = save(factors() if tensors is None else tensors)
    await ask(server, send(weights))
    return GivenAdapter(config(**changes), hashlib.sha256(weights).hexdigest())


async def test_what_does_not_fit_the_job_is_refused_by_the_server_too(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:

        async def refused(kind: type[FedError], text: str, adapter: GivenAdapter, name: str = "lora") -> None:
            with pytest.raises(kind, match=text):
                await ask(server, lambda client: client.submit(job_with(name).to_json(), adapter))

        good = await given(server)
        await refused(NotFound, f"the weights of adapter {'ab' * 32} are not here", good._replace(digest="ab" * 32))
        await refused(InvalidInput, "is not a SHA-256", good._replace(digest="x"))
        await refused(InvalidInput, "use_dora true", good._replace(config=config(use_dora=True)))
        await refused(InvalidInput, "cannot start from a PEFT adapter", good, "full")
        await refused(InvalidInput, r"shape \(3, 5\), of rank 2", await given(server, factors(rank=3)))
        assert server.federation.services.store.jobs() == []
        await ask(server, lambda client: client.submit(job_with().to_json(), good))
        (record,) = server.federation.services.store.jobs()
        assert record.adapter_blob == good.digest


# -- version 0 -------------------------------------------------------------------------------------------------------

FFA = Layout.of(
    [
        *((t.group, t.name, t.shape, t.dtype) for t in layout_of().tensors if "lora_B" in t.name),
        *((BASIS_GROUP, t.name, t.shape, t.dtype) for t in layout_of().tensors if "lora_A" in t.name),
    ]
)


@asynccontextmanager
async def at_work(
    folder: Path, layout: Layout, tensors: Tensors | None = None, name: str = "lora"
) -> AsyncIterator[tuple[TestServer, Member, str]]:
    async with running_server(folder) as server:
        identity = await server.enrol("ann")
        transport = InProcessTransport(server.federation, "ann")
        adapter = await given(server, tensors)
        record = await server.federation.submit(job_with(name).to_json(), adapter)
        async with playing(transport, identity.signing_key, PLAYED) as player:
            yield server, Member("ann", identity, transport, player, layout), record.job_id


@pytest.mark.parametrize(("name", "layout"), [("lora", layout_of()), ("ffa-lora", FFA)])
async def test_version_0_has_the_values_of_the_file_bit_for_bit(tmp_path: Path, name: str, layout: Layout) -> None:
    async with at_work(tmp_path, layout, name=name) as (server, ann, job_id):
        first = await ann.next_work()
        frame = RAW.encode(np.ones(layout.num_values, np.float32), np.random.default_rng(0))
        rows = [[t.group, t.name, list(t.shape), t.dtype] for t in layout.tensors]
        header = ann.player.header(first, frame, layout_digest=layout.digest, layout=rows)
        assert (await ann.player.send(header, frame)).result is UpdateResult.ACCEPTED
        work = await ann.next_work()
        assert work.kind is WorkKind.TRAIN
        version, services = server.federation.version(job_id, 0), server.federation.services
        parts = [version.state_blob] if version.basis_blob is None else [version.state_blob, version.basis_blob]
        state = b"".join(bytes(services.vault.open(digest)) for digest in parts)
        expected = factors()
        assert state == b"".join(expected[PEFT_PREFIX + tensor.name].tobytes() for tensor in layout.tensors)
        assert len(work.frame) > 0
        assert work.frame.endswith(bytes(services.vault.open(version.state_blob))), "clients start from these"
        (shown,) = status_of(server.federation, 1, job_id)["jobs"]
        assert shown["adapter_sha256"] == hashlib.sha256(save(expected)).hexdigest()
        found = await ask(server, lambda client: client.version(job_id))
        assert found.adapter_sha256 == shown["adapter_sha256"]


@pytest.mark.parametrize(
    ("sides", "text"),
    [
        ({"first": (6, 5)}, "missing: block.second.lora_A.weight, block.second.lora_B.weight"),
        ({**SIDES, "third": (2, 2)}, "not in the job's model: third.lora_A.weight, third.lora_B.weight"),
        ({**SIDES, "first": (6, 7)}, "of another shape: first.lora_A.weight (2, 7), in the job (2, 5)"),
    ],
)
async def test_an_adapter_for_another_model_ends_the_job_with_the_reason(
    tmp_path: Path, sides: dict[str, tuple[int, int]], text: str
) -> None:
    async with at_work(tmp_path, layout_of(), factors(sides)) as (server, ann, job_id):
        assert (await ann.answer(await ann.next_work())).result is UpdateResult.ACCEPTED
        await ended(server, job_id)
        record = server.federation.job(job_id)
        assert record.status is JobStatus.FAILED
        assert record.failure == f"the adapter that the job was to start from does not fit: {text}"
        assert record.layout is None


@pytest.mark.parametrize("damage", ["", "missing", "changed"])
async def test_after_a_restart_the_weights_are_compared_with_their_digest(tmp_path: Path, damage: str) -> None:
    weights, blobs = save(factors()), MemoryBlobs()
    digest = hashlib.sha256(weights).hexdigest()
    record = JobRecord("a" * 32, "given", job_with().to_json(), JobStatus.RUNNING, 1.0, adapter_blob=digest)
    if damage != "missing":
        blobs.put(weights[:-1] + b"x" if damage else weights, digest)
    async with running_server(tmp_path, blobs=blobs) as server:
        services, plan = server.federation.services, make_plan(job_with(), "given")
        if not damage:
            assert recover(record, plan, None, services).latest is None
            return
        with pytest.raises(StateUnusable, match="the adapter that job aaaa"):
            recover(record, plan, None, services)
