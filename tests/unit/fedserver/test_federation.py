"""The server without a wire, its clients played by the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fedclient.identity import ClientIdentity
from fedcore.errors import JobFileError, NotFound, StorageFailed, UpdateResult
from fedcore.identity import sign
from fedcore.jobfile import parse_job
from fedcore.messages import MAX_METRIC, SIGNATURE_CONTEXT, Cancel, WorkKind
from fedserver.federation import HEARTBEAT_INTERVAL_S
from fedserver.state.base import Bytes
from fedserver.state.memory import MemoryBlobs
from fedserver.status import status_of
from fedsim.transport import InProcessTransport
from tests.support.hand_clock import HandClock
from tests.support.player import HELLO, LAYOUT, RAW, Player, playing
from tests.support.server import TestServer, running_server, small_job


async def ended(server: TestServer, job_id: str) -> None:
    while job_id in server.federation.engines:
        await server.federation.next_change().wait()


async def member(server: TestServer, name: str) -> tuple[InProcessTransport, ClientIdentity]:
    return InProcessTransport(server.federation, name), await server.enrol(name)


@asynccontextmanager
async def a_player(server: TestServer) -> AsyncIterator[Player]:
    transport, identity = await member(server, "alice")
    async with playing(transport, identity.signing_key) as player:
        yield player


async def test_the_space_of_an_unfinished_upload_is_given_back_when_its_job_stops(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport, identity = await member(server, "alice")
        record = await server.federation.submit(small_job().to_json())
        async with playing(transport, identity.signing_key) as player:
            work = await player.next_work()
            frame = RAW.encode(np.ones(LAYOUT.num_values, np.float32), np.random.default_rng(0))
            data = player.header(work, frame).to_bytes()
            await transport.upload(data, sign(identity.signing_key, SIGNATURE_CONTEXT, data), frame[:20], 0)
            assert sum(server.federation.services.blobs.spools().values()) == 20
            await server.federation.stop_job(record.job_id)
            assert isinstance(await player.next_order(), Cancel)
        assert server.federation.services.blobs.spools() == {}


async def test_another_client_does_not_see_an_upload_that_is_not_its_own(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport, identity = await member(server, "alice")
        await server.federation.submit(small_job().to_json())
        async with playing(transport, identity.signing_key) as player:
            work = await player.next_work()
            frame = RAW.encode(np.ones(LAYOUT.num_values, np.float32), np.random.default_rng(0))
            header = player.header(work, frame)
            data = header.to_bytes()
            await transport.upload(data, sign(identity.signing_key, SIGNATURE_CONTEXT, data), frame[:20], 0)
            mallory = InProcessTransport(server.federation, "mallory")
            assert (await mallory.upload_state(header.update_id)).received_bytes == 0
            assert (await transport.upload_state(header.update_id)).received_bytes == 20


async def test_a_job_that_this_server_cannot_run_is_refused_with_every_reason(tmp_path: Path) -> None:
    tree = small_job().model_dump(mode="json")
    tree["aggregator"]["rule"] = "weigted-mean"
    tree["server_optimizer"]["name"] = "adamm"
    tree["compression"]["uplink"] = [{"codec": "bf61"}]
    async with running_server(tmp_path) as server:
        with pytest.raises(JobFileError) as caught:
            await server.federation.submit(parse_job(tree, "bad").to_json())
        text = str(caught.value)
        for guess in ("weighted-mean", "adam", "bf16"):
            assert guess in text
        assert server.federation.services.store.jobs() == []


async def test_what_is_said_of_a_job_has_a_bound_whatever_its_plugins_find(tmp_path: Path) -> None:
    tree = small_job().model_dump(mode="json")
    tree["aggregator"] |= {f"{'k' * 300}{i}": i for i in range(100)}
    async with running_server(tmp_path) as server:
        with pytest.raises(JobFileError) as caught:
            await server.federation.submit(parse_job(tree, "bad").to_json())
    assert len(str(caught.value)) < 2 * JobFileError.MAX_CHARS


@pytest.mark.parametrize("how", ["silence", "revocation", "shutdown"])
async def test_who_watches_hears_of_the_end_of_a_session_whose_stream_is_held_up(tmp_path: Path, how: str) -> None:
    clock = HandClock()
    async with running_server(tmp_path, clock) as server:
        federation = server.federation
        await server.enrol("alice")
        federation.join("alice", HELLO)  # and nobody asks for its orders, as when a write to the client waits
        change = federation.next_change()
        match how:
            case "silence":
                for _ in range(4):
                    await clock.wait_for_sleepers(HEARTBEAT_INTERVAL_S)
                    clock.advance(HEARTBEAT_INTERVAL_S)
                await clock.wait_for_sleepers(HEARTBEAT_INTERVAL_S)
            case "revocation":
                await server.membership.revoke("alice")
            case "shutdown":
                federation.close_sessions()
        assert change.is_set()
        assert status_of(federation, enrolled=1)["clients"]["connected"] == 0
        connected = federation.services.metrics.clients_connected.collect()
        assert [sample.value for metric in connected for sample in metric.samples] == [0.0]


async def test_an_unknown_job_names_the_known_ones(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        record = await server.federation.submit(small_job().to_json())
        with pytest.raises(NotFound, match=rf"small \({record.job_id[:8]}\)"):
            server.federation.job("smal")


@pytest.mark.parametrize("said", ["cd" * 32, None])
async def test_a_version_0_from_another_base_than_the_job_pins_is_refused(tmp_path: Path, said: str | None) -> None:
    job = small_job()
    job = job.model_copy(update={"job": job.job.model_copy(update={"base_digest": "ab" * 32})})
    async with running_server(tmp_path) as server, a_player(server) as player:
        record = await server.federation.submit(job.to_json())
        work = await player.next_work()
        assert work.base_digest == "ab" * 32
        state = await player.answer(work, base_digest=said)
        assert state.result is UpdateResult.WRONG_BASE
        assert f"{said or 'none'}, the job pins {'ab' * 32}" in state.text
        assert server.federation.job(record.job_id).layout is None


@pytest.mark.parametrize("said", ["cd" * 32, None])
async def test_without_a_pin_version_0_decides_for_which_base_the_job_is(tmp_path: Path, said: str | None) -> None:
    async with running_server(tmp_path) as server, a_player(server) as player:
        record = await server.federation.submit(small_job().to_json())
        work = await player.next_work()
        assert work.base_digest == ""
        await player.answer(work, base_digest=said)
        work = await player.next_work()
        assert (work.kind, work.base_digest) == (WorkKind.TRAIN, said or "")
        await player.answer(work)
        found = server.federation.services.store.job(record.job_id)
        assert found is not None
        assert found.base_digest == said


async def test_a_client_that_lacks_the_task_is_not_asked(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport, identity = await member(server, "alice")
        tree = small_job().model_dump(mode="json") | {"task": {"name": "something-else"}}
        other = await server.federation.submit(parse_job(tree, "other").to_json())
        own = await server.federation.submit(small_job().to_json())
        async with playing(transport, identity.signing_key) as player:
            assert (await player.next_work()).job_id == own.job_id
            assert server.federation.engines[other.job_id].state.waiting_for().missing == 1
            shown = {job["job_id"]: job for job in status_of(server.federation, enrolled=1)["jobs"]}
            assert (shown[own.job_id]["fitting_clients"], shown[other.job_id]["fitting_clients"]) == (1, 0)
            assert shown[other.job_id]["needs"] == {"task": "something-else", "adapter": "full", "codecs": ["raw"]}


async def test_an_update_id_that_somebody_else_has_used_does_not_hold_the_round_up(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport_a, alice = await member(server, "alice")
        transport_b, bob = await member(server, "bob")
        record = await server.federation.submit(small_job(cohort=2, quorum=1).to_json())
        async with playing(transport_a, alice.signing_key) as first:
            await first.answer(await first.next_work())  # version 0
            async with playing(transport_b, bob.signing_key) as second:
                stolen = "a" * 32
                state = await first.answer(await first.next_work(), update_id=stolen)
                assert state.result is UpdateResult.ACCEPTED
                state = await second.answer(await second.next_work(), update_id=stolen)
                assert state.result is UpdateResult.DUPLICATE
                for player in (first, second):
                    assert (await player.next_work()).kind is WorkKind.EVALUATE
        assert server.federation.version(record.job_id, 1).num_updates == 1


class FailingBlobs(MemoryBlobs):
    """A disk that fails at the next write, once."""

    is_failing = False

    def put(self, data: Bytes, digest: str | None = None) -> str:
        if self.is_failing:
            self.is_failing = False
            raise StorageFailed("no space left on device")
        return super().put(data, digest)


async def test_a_disk_that_fails_under_an_update_stops_the_server_and_nothing_is_acknowledged(tmp_path: Path) -> None:
    blobs = FailingBlobs()
    async with running_server(tmp_path, blobs=blobs) as server:
        transport, identity = await member(server, "alice")
        await server.federation.submit(small_job().to_json())
        async with playing(transport, identity.signing_key) as player:
            work = await player.next_work()
            blobs.is_failing = True
            frame = RAW.encode(np.zeros(LAYOUT.num_values, np.float32), np.random.default_rng(0))
            header = player.header(work, frame).to_bytes()
            with pytest.raises(StorageFailed):
                await transport.upload(header, sign(player.key, SIGNATURE_CONTEXT, header), frame, 0)
            failed = server.federation.services.journal.failed
            assert isinstance(failed.result(), StorageFailed)
            with pytest.raises(StorageFailed):  # nothing is taken in any more
                await server.membership.issue_token("bob", 60)
        assert server.federation.services.store.update(work.assignment_id) is None


async def test_figures_at_their_bounds_leave_the_job_and_its_status_sound(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport_a, alice = await member(server, "alice")
        transport_b, bob = await member(server, "bob")
        record = await server.federation.submit(small_job(cohort=2).to_json())
        async with (
            playing(transport_a, alice.signing_key) as first,
            playing(transport_b, bob.signing_key) as second,
        ):
            await first.answer(await first.next_work())
            for player, sign_of in ((first, 1), (second, -1)):
                work = await player.next_work()
                with pytest.raises(ValidationError):
                    player.header(work, b"", evaluation={"accuracy": sign_of * 1.7e308})
                state = await player.answer(
                    work, evaluated_examples=2**31, evaluation={"accuracy": sign_of * MAX_METRIC}
                )
                assert state.result is UpdateResult.ACCEPTED
            await first.next_work()
        row = server.federation.version(record.job_id, 0)
        assert json.loads(row.metrics, parse_constant=pytest.fail)["accuracy"] == 0.0
