"""Uploads in chunks over several connections: none of them can end the job, and each hears the one true answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.identity import sign
from fedcore.messages import (
    MAX_METRICS,
    SIGNATURE_CONTEXT,
    Assignment,
    Decline,
    UpdateHeader,
    UploadState,
    WorkKind,
)
from fedserver.rounds.intake import SHORT_HEADER_BYTES, Announced, Intake, Upload
from fedserver.state.base import Bytes
from fedserver.state.memory import MemorySpool
from fedserver.state.records import Record
from fedsim.transport import InProcessTransport
from tests.support.player import LAYOUT, RAW, Player, playing
from tests.support.server import running_server, small_job

FRAME = RAW.encode(np.ones(LAYOUT.num_values, np.float32), np.random.default_rng(0))


@dataclass
class Scene:
    """A client with version 0 to build, and the server's side of its uploads."""

    intake: Intake
    player: Player
    work: Assignment

    async def begin(self, update_id: str) -> Upload:
        data = self.player.header(self.work, FRAME, update_id=update_id).to_bytes()
        signature = sign(self.player.key, SIGNATURE_CONTEXT, data)
        announced = await self.intake.announce(self.player.transport.client, data, signature)
        assert not isinstance(announced, UploadState)
        return self.intake.upload(announced)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running_server(tmp_path) as server:
        identity = await server.enrol("ann")
        await server.federation.submit(small_job().to_json())
        transport = InProcessTransport(server.federation, "ann")
        async with playing(transport, identity.signing_key) as player:
            yield Scene(server.federation.intake, player, await player.next_work())


async def test_a_complete_upload_that_was_given_up_is_refused_and_the_other_goes_on(scene: Scene) -> None:
    first = await scene.begin("a" * 32)
    await first.append(0, FRAME)
    second = await scene.begin("b" * 32)
    for late in (first.finish(), first.append(len(FRAME), b"")):
        with pytest.raises(UpdateRejected, match="another upload") as caught:
            await late
        assert caught.value.reason is UpdateResult.TOO_LATE
    await second.append(0, FRAME)
    assert (await second.finish()).result is UpdateResult.ACCEPTED


async def test_an_upload_that_came_over_two_connections_is_answered_alike_on_both(scene: Scene) -> None:
    one, two = await scene.begin("a" * 32), await scene.begin("a" * 32)
    await one.append(0, FRAME[:10])
    await two.append(10, FRAME[10:])
    answer = await one.finish()
    assert answer.result is UpdateResult.ACCEPTED
    assert await two.finish() == answer


async def test_a_chunk_whose_connection_breaks_while_it_is_written_is_taken_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    append = MemorySpool.append

    def slowly(spool: MemorySpool, data: Bytes) -> None:
        writing.set()
        assert go_on.wait(20)
        append(spool, data)

    monkeypatch.setattr(MemorySpool, "append", slowly)
    first = await scene.begin("a" * 32)
    broken = asyncio.create_task(first.append(0, FRAME[:10]))
    assert await asyncio.to_thread(writing.wait, 20)
    broken.cancel()
    await asyncio.gather(broken, return_exceptions=True)
    second = await scene.begin("a" * 32)
    resuming = asyncio.create_task(second.resume())
    await asyncio.sleep(0)
    assert not resuming.done()
    go_on.set()
    assert await resuming == 10
    await second.append(10, FRAME[10:])
    assert (await second.finish()).result is UpdateResult.ACCEPTED


async def test_a_decline_whose_connection_breaks_frees_the_client_all_the_same(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = scene.player.transport._server  # type: ignore[attr-defined]
    (engine,) = server.engines.values()
    assert server.fleet.seats["ann"].work == scene.work.assignment_id
    assert engine.state.waiting_for().clients == ("ann",)
    write, writing = engine._services.journal.write, asyncio.Event()

    async def slowly(*records: Record) -> None:
        writing.set()
        await asyncio.Event().wait()
        await write(*records)

    monkeypatch.setattr(engine._services.journal, "write", slowly)
    declining = asyncio.create_task(engine.declined("ann", Decline(scene.work.assignment_id, "no", transient=True)))
    await writing.wait()
    monkeypatch.setattr(engine._services.journal, "write", write)
    declining.cancel()
    await asyncio.gather(declining, return_exceptions=True)
    assert server.fleet.seats["ann"].work == ""
    while engine.state.waiting_for().clients:
        await asyncio.wait_for(server.next_change().wait(), 20)


async def test_nothing_is_read_of_a_header_that_its_sender_has_not_signed(scene: Scene) -> None:
    with pytest.raises(UpdateRejected) as caught:
        await scene.intake.announce("ann", b"no header at all", bytes(64))
    assert caught.value.reason is UpdateResult.BAD_SIGNATURE


async def test_a_long_header_is_read_only_while_the_first_version_is_asked_for(scene: Scene) -> None:
    long = scene.player.header(scene.work, FRAME).to_bytes().ljust(SHORT_HEADER_BYTES + 1)
    signature = sign(scene.player.key, SIGNATURE_CONTEXT, long)
    assert isinstance(await scene.intake.announce("ann", long, signature), Announced)
    await scene.player.answer(scene.work)
    work = await scene.player.next_work()
    assert work.kind is WorkKind.TRAIN
    with pytest.raises(UpdateRejected, match=f"header of {len(long)} bytes, at most {SHORT_HEADER_BYTES}") as caught:
        await scene.intake.announce("ann", long, signature)
    assert caught.value.reason is UpdateResult.TOO_LATE


def test_no_header_without_a_layout_is_long() -> None:
    names = [f"{number:064}" for number in range(MAX_METRICS)]
    values = dict.fromkeys(names, -1.2345678901234567e-30)
    header = UpdateHeader(
        federation="f" * 64,
        update_id="0" * 32,
        assignment_id="0" * 32,
        job_id="0" * 32,
        version=2**48 - 1,
        kind=WorkKind.TRAIN,
        layout_digest="0" * 64,
        frame_bytes=2**48 - 1,
        frame_digest="0" * 64,
        num_examples=2**48 - 1,
        metrics=values,
        evaluated_examples=2**31,
        evaluation=values,
    )
    assert len(header.to_bytes()) < SHORT_HEADER_BYTES
