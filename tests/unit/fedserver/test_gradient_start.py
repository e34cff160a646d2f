"""What the server takes and refuses of a job that starts from gradients; the clients are played."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.adapters import LoraSbParams, gradient_layout
from fedcore.errors import InvalidInput, JobFileError, NotFound, UpdateResult
from fedcore.jobfile import parse_job
from fedcore.layout import BASIS_GROUP, Layout, Vector
from fedcore.messages import CHUNK_BYTES, Assignment, Piece, WorkKind
from fedserver.rounds import start
from fedserver.rounds.start import GradientStart
from fedsim.transport import InProcessTransport
from tests.support.crew import Member
from tests.support.player import HELLO, LAYOUT, RAW, playing
from tests.support.server import TestServer, running_server, small_job
from tests.unit.fedserver.test_federation import ended

RANK = 2
PLAYED = replace(HELLO, adapters=("lora-sb",))


def layout_of(*sides: tuple[int, int], rank: int = RANK) -> Layout:
    moving = ((f"{i}.lora_R.weight", (rank, rank)) for i in range(len(sides)))
    basis = [
        (f"{i}.lora_{factor}.weight", shape)
        for i, (m, n) in enumerate(sides)
        for factor, shape in (("A", (rank, n)), ("B", (m, rank)))
    ]
    return Layout.of(
        [
            *(("adapter", *row, "float32") for row in moving),
            *((BASIS_GROUP, *row, "float32") for row in basis),
        ]
    )


SB = layout_of((6, 5), (4, 8))


@asynccontextmanager
async def at_work(
    folder: Path, layout: Layout = SB, **adapter: object
) -> AsyncIterator[tuple[TestServer, Member, str]]:
    """Run a server with one played client and a job."""
    tree = small_job(rounds=2, max_retries=0).model_dump(mode="json")
    job = parse_job(tree | {"adapter": {"name": "lora-sb", "rank": RANK, **adapter}}, "sb")
    async with running_server(folder) as server:
        identity = await server.enrol("ann")
        transport = InProcessTransport(server.federation, "ann")
        record = await server.federation.submit(job.to_json())
        async with playing(transport, identity.signing_key, PLAYED) as player:
            yield server, Member("ann", identity, transport, player, layout), record.job_id


async def until(member: Member, kind: WorkKind) -> Assignment:
    while (work := await member.next_work()).kind is not kind:
        assert (await member.answer(work)).result is UpdateResult.ACCEPTED
    return work


async def test_an_assignment_names_the_basis_once_there_is_one(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (server, ann, job_id):
        gradient = await until(ann, WorkKind.GRADIENT)
        assert (gradient.version, gradient.basis_digest) == (0, "")
        assert (await ann.answer(gradient)).result is UpdateResult.ACCEPTED
        work = await ann.next_work()
        assert (work.kind, work.version) == (WorkKind.TRAIN, 1)
        record = server.federation.version(job_id, 1)
        assert work.basis_digest == record.basis_blob
        whole = b"".join([chunk async for chunk in ann.transport.download(job_id, 1, 0, piece=Piece.BASIS)])
        assert len(whole) == 4 * SB.num_basis_values
        rest = b"".join([chunk async for chunk in ann.transport.download(job_id, 1, 12, piece=Piece.BASIS)])
        assert rest == whole[12:]
        assert server.federation.version(job_id, 0).basis_blob is None
        with pytest.raises(NotFound, match=r"version 0 of job .* has no basis"):
            await anext(aiter(ann.transport.download(job_id, 0, 0, piece=Piece.BASIS)))
        with pytest.raises(InvalidInput, match=f"offset {len(whole) + 1}"):
            await anext(aiter(ann.transport.download(job_id, 1, len(whole) + 1, piece=Piece.BASIS)))


@pytest.mark.parametrize("basis", [None, "ab" * 32])
async def test_an_update_that_was_computed_with_another_basis_is_refused(tmp_path: Path, basis: str | None) -> None:
    async with at_work(tmp_path) as (_, ann, _):
        work = await until(ann, WorkKind.TRAIN)
        state = await ann.answer(work, basis_digest=basis)
        assert state.result is UpdateResult.WRONG_LAYOUT
        named = "abababababab" if basis else "none"
        assert state.text.endswith(f"computed with basis {named}, the job's is {work.basis_digest[:12]}")


async def test_a_basis_before_there_is_one_is_refused(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (_, ann, _):
        work = await until(ann, WorkKind.GRADIENT)
        state = await ann.answer(work, basis_digest="ab" * 32)
        assert state.result is UpdateResult.WRONG_LAYOUT
        assert state.text.endswith("computed with basis abababababab, the job's is none")


@pytest.mark.parametrize(
    ("values", "changes", "result"),
    [
        ([np.nan], {}, UpdateResult.NOT_FINITE),
        ([1e31], {}, UpdateResult.OUT_OF_BOUNDS),
        ([1e29], {}, UpdateResult.ACCEPTED),  # far above the job's max_abs, which is of updates
        ([1.0], {"num_examples": 0}, UpdateResult.OUT_OF_BOUNDS),
        ([1.0], {"layout_digest": LAYOUT.digest}, UpdateResult.WRONG_LAYOUT),
    ],
)
async def test_a_gradient_is_checked_like_an_update(
    tmp_path: Path, values: list[float], changes: dict[str, Any], result: UpdateResult
) -> None:
    async with at_work(tmp_path) as (_, ann, _):
        work = await until(ann, WorkKind.GRADIENT)
        gradient = np.ones(gradient_layout(SB).num_values, np.float32)
        gradient[: len(values)] = values
        frame = RAW.encode(gradient, np.random.default_rng(0))
        common = {"layout_digest": SB.digest, "num_examples": 5}
        state = await ann.player.send(ann.player.header(work, frame, **common | changes), frame)
        assert state.result is result


async def test_a_gradient_of_another_length_is_refused(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (_, ann, _):
        work = await until(ann, WorkKind.GRADIENT)
        for size in (1, -1):
            gradient = np.ones(gradient_layout(SB).num_values + size, np.float32)
            frame = RAW.encode(gradient, np.random.default_rng(0))
            state = await ann.player.send(
                ann.player.header(work, frame, layout_digest=SB.digest, num_examples=5), frame
            )
            assert state.result in {UpdateResult.WRONG_SIZE, UpdateResult.MALFORMED, UpdateResult.DUPLICATE}


async def test_gradients_of_zeros_fail_the_job_with_a_sentence(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (server, ann, job_id):
        work = await until(ann, WorkKind.GRADIENT)
        frame = RAW.encode(np.zeros(gradient_layout(SB).num_values, np.float32), np.random.default_rng(0))
        await ann.player.send(ann.player.header(work, frame, layout_digest=SB.digest, num_examples=5), frame)
        await ended(server, job_id)
        assert server.federation.job(job_id).failure == (
            "layer 0: gradient sum is 0 everywhere: it has no direction, so there is no basis to find"
        )


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (LAYOUT, "no tensor is an R between two factors"),
        (layout_of((6, 5), (1, 8)), "module 1: rank 2, above min(1, 8)"),
        (layout_of((1 << 20, 1 << 20)), "more than 68719476736 values up to tensor 0"),
        (Layout.of(("x" if t.group == "adapter" else t.group, t.name, t.shape, t.dtype) for t in SB.tensors), "no R"),
        (Layout.of((t.group, t.name[1:], t.shape, t.dtype) for t in layout_of((6, 5)).tensors), "tensor name ''"),
    ],
)
async def test_a_first_version_that_cannot_start_is_refused(tmp_path: Path, layout: Layout, reason: str) -> None:
    async with at_work(tmp_path, layout) as (_, ann, _):
        state = await ann.answer(await ann.next_work())
        assert state.result is UpdateResult.WRONG_LAYOUT
        assert reason in state.text


async def test_a_client_without_the_codec_of_votes_is_not_asked(tmp_path: Path) -> None:
    async with at_work(tmp_path, votes=True) as (server, ann, job_id):
        other = await server.federation.submit(small_job().to_json())  # of the adapter full
        assert server.federation.engines[job_id].plan.codecs == {"raw", "sign"}
        assert not server.federation.engines[job_id].fits(replace(PLAYED, codecs=("raw", "bf16")))
        assert server.federation.engines[job_id].fits(replace(PLAYED, codecs=("raw", "sign")))
        assert other.job_id != job_id
        assert ann.name == "ann"


async def test_wrong_parameters_are_refused_when_the_job_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"adapter\.samples") as raised:
        async with at_work(tmp_path, samples=0, alpha=3.0):
            pass
    assert "adapter.alpha: unknown key" in str(raised.value)


# -- the sum ---------------------------------------------------------------------------------------------------------


def begin(layout: Layout, sent: list[Vector], rank: int = RANK) -> tuple[Vector, Vector]:
    starts = GradientStart(LoraSbParams(rank=rank))
    sizes = gradient_layout(layout).sizes
    frames = [starts.uplink.encode(values, np.random.default_rng(0), sizes) for values in sent]

    def opened() -> Iterator[memoryview]:
        return map(memoryview, frames)

    return starts.factors(layout, np.zeros(layout.moving.num_values, np.float32), opened)


def test_sums_in_several_passes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of((60, 50), (4, 8), (30, 31), (64, 64))
    rng = np.random.default_rng(1)
    sent = [rng.standard_normal(gradient_layout(layout).num_values).astype(np.float32) for _ in range(3)]
    at_once = begin(layout, sent)
    for values in (1, 40, 3_500, 4_096):
        monkeypatch.setattr(start, "SUMMED_VALUES", values)
        again = begin(layout, sent)
        assert [part.tobytes() for part in again] == [part.tobytes() for part in at_once]


def test_memory_of_the_start_does_not_grow_with_the_clients() -> None:
    layout = layout_of((300, 400))
    rng = np.random.default_rng(2)
    gradient = rng.standard_normal(gradient_layout(layout).num_values).astype(np.float32)
    starts, first_D = GradientStart(LoraSbParams(rank=RANK)), np.zeros(layout.moving.num_values, np.float32)
    frame = memoryview(starts.uplink.encode(gradient, np.random.default_rng(0)))

    def peak_bytes(clients: int) -> int:
        tracemalloc.start()
        try:
            starts.factors(layout, first_D, lambda: iter([frame] * clients))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(40) < 1.1 * peak_bytes(2)


async def test_a_version_is_read_as_one_vector_from_any_offset(tmp_path: Path) -> None:
    big = layout_of((300, 200), (CHUNK_BYTES // 8, 3))
    async with at_work(tmp_path, big) as (server, ann, job_id):
        await until(ann, WorkKind.TRAIN)
        vault, record = server.federation.services.vault, server.federation.version(job_id, 1)
        assert record.basis_blob is not None
        parts = [bytes(vault.open(digest)) for digest in (record.state_blob, record.basis_blob)]
        whole = b"".join(parts)
        assert len(whole) == 4 * big.num_values
        for offset in (0, 4, len(parts[0]) - 4, len(parts[0]), len(parts[0]) + 8, len(whole)):
            read = [chunk async for chunk in server.federation.state(job_id, 1, offset)]
            assert b"".join(read) == whole[offset:], offset
        with pytest.raises(InvalidInput, match="offset"):
            await anext(aiter(server.federation.state(job_id, 1, len(whole) + 1)))
