"""What clients are told of their updates that count, and what the history says of bytes and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcodec import build_pipeline
from fedcore.errors import UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.messages import MAX_METRIC, Assignment, UpdateHeader, UploadState, WorkKind
from fedserver.federation import Federation
from fedserver.metrics import Metrics
from fedserver.rounds.counted import Counted
from fedserver.rounds.figures import mean_encoding_error
from fedserver.rounds.fleet import Fleet
from fedserver.state.memory import MemoryStore
from fedserver.state.records import AttemptRecord, Record, UpdateRecord
from fedserver.status import history_of, status_of
from fedsim.transport import InProcessTransport
from tests.support.player import LAYOUT, RAW, Player, playing
from tests.support.server import FEDERATION, running_server, small_job

BF16 = build_pipeline([{"codec": "bf16"}])
NAMES = "abc"


def job_with(max_age: int | None, rounds: int = 1, cohort: int = 1) -> Job:
    feedback = None if max_age is None else {"max_age": max_age}
    compression = {"uplink": [{"codec": "bf16"}], "error_feedback": feedback}
    return parse_job(small_job(cohort, rounds).model_dump(mode="json") | {"compression": compression}, "job")


def journal_of(rounds: Sequence[Sequence[set[str]]]) -> list[Record]:
    """Return the journal of a job: for each version the accepted clients of each attempt, of which the last closed."""
    records: list[Record] = []
    for version, attempts in enumerate(rounds):
        for attempt, clients in enumerate(attempts):
            outcome = "closed" if attempt == len(attempts) - 1 else "abandoned"
            place = ("job", version, attempt, WorkKind.TRAIN)
            records.append(AttemptRecord(*place, 0.0, 0.0, 0.0, outcome))
            for name in NAMES:
                result = UpdateResult.ACCEPTED if name in clients else UpdateResult.NOT_FINITE
                key = f"{version}-{attempt}-{name}"
                records.append(UpdateRecord(key, key, *place, name, result, "", b"", b"", None, 0, 1, "{}", 0.0))
    return records


some_clients = st.sets(st.sampled_from(NAMES))


@settings(max_examples=60)
@given(
    st.lists(st.lists(some_clients, min_size=1, max_size=3), max_size=8),
    st.sampled_from([None, 1, 2, 3, 100]),
)
def test_what_counted_is_the_same_from_round_to_round_and_from_the_journal(
    rounds: list[list[set[str]]], max_age: int | None
) -> None:
    job, store = job_with(max_age), MemoryStore()
    store.write(journal_of(rounds))
    live = Counted(job)
    for version, attempts in enumerate(rounds):
        live.add(version + 1, attempts[-1])
    latest = len(rounds)
    for counted in (live, Counted.recovered(job, store, "job")):
        for name in NAMES:
            bases = [version for version, attempts in enumerate(rounds) if name in attempts[-1]]
            expected = 0
            if bases and max_age is not None and latest - bases[-1] <= max_age:
                expected = bases[-1] + 1
            assert counted.of(name, latest) == expected


def test_clients_that_are_long_gone_take_no_memory() -> None:
    counted = Counted(job_with(2))
    for version in range(1, 1000):
        counted.add(version, [f"client-{version}"])
    assert len(counted._newest) == 2


async def answered(player: Player, error: float | None = None) -> Assignment:
    """Answer the next work, and return it."""
    work = await player.next_work()
    assert (await answer(player, work, error)).result is UpdateResult.ACCEPTED
    return work


async def answer(player: Player, work: Assignment, error: float | None = None, **changes: Any) -> UploadState:
    frame = b""
    if work.kind is not WorkKind.EVALUATE:
        pipeline = BF16 if work.kind is WorkKind.TRAIN else RAW
        frame = pipeline.encode(np.ones(LAYOUT.num_values, np.float32), np.random.default_rng(0))
    return await player.send(player.header(work, frame, encoding_error=error, **changes), frame)


@pytest.mark.parametrize(("max_age", "counts"), [(None, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (100, [0, 1, 2, 3])])
async def test_an_assignment_says_where_the_newest_update_counts_and_so_does_a_restarted_server(
    tmp_path: Path, max_age: int | None, counts: list[int]
) -> None:
    async with running_server(tmp_path) as server:
        await server.federation.submit(job_with(max_age, rounds=4).to_json())
        identity = await server.enrol("alice")
        async with playing(InProcessTransport(server.federation, "alice"), identity.signing_key) as player:
            works = [await answered(player) for _ in range(3)]
            works.append(await player.next_work())  # and the server is gone
        services = replace(server.federation.services, fleet=Fleet(), metrics=Metrics())
        second_life = Federation(services, FEDERATION, server.membership.signing_key)
        running = asyncio.create_task(second_life.run())
        await asyncio.wait_for(second_life.recovered.wait(), 10)
        async with playing(InProcessTransport(second_life, "alice"), identity.signing_key) as player:
            works += [await answered(player) for _ in range(3)]
        running.cancel()
        await asyncio.wait({running})
    told = [(work.kind, work.version, work.counted_in) for work in works]
    assert told == [
        (WorkKind.INITIALISE, 0, 0),
        *((WorkKind.TRAIN, version, counts[version]) for version in (0, 1, 2, 2, 3)),
        (WorkKind.EVALUATE, 4, 0),
    ]


async def test_the_history_shows_errors_and_what_the_values_had_been_raw(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        record = await server.federation.submit(job_with(None, cohort=2, rounds=2).to_json())
        metrics, raw_bytes = server.federation.services.metrics, 4 * LAYOUT.num_values

        async def take_part(name: str, errors: Sequence[float | None]) -> None:
            identity = await server.enrol(name)
            async with playing(InProcessTransport(server.federation, name), identity.signing_key) as player:
                for error in errors:
                    while (work := await player.next_work()).kind is not WorkKind.TRAIN:
                        await answer(player, work)
                    refused = await answer(player, work, error, federation="elsewhere")  # nobody knows whose bytes
                    assert refused.result is UpdateResult.BAD_SIGNATURE
                    states = [await answer(player, work, error) for _ in range(2)]  # the first answer was lost
                    assert [state.result for state in states] == [UpdateResult.ACCEPTED] * 2
                await answered(player)

        await asyncio.gather(take_part("alice", [0.25, None]), take_part("bob", [0.5, None]))
        while record.job_id in server.federation.engines:
            await server.federation.next_change().wait()
        history = history_of(server.federation, record.job_id)
        (job,) = status_of(server.federation, 2, record.job_id)["jobs"]
    assert [row["encoding_error"] for row in history] == [None, 0.375, None]
    assert [row["raw_uplink_bytes"] for row in history] == [0, 2 * raw_bytes, 2 * raw_bytes]
    assert job["raw_uplink_bytes"] == 4 * raw_bytes
    labels = {"job": record.job_id}
    assert metrics.registry.get_sample_value("roundtable_raw_uplink_bytes_total", labels) == 4 * raw_bytes
    assert metrics.registry.get_sample_value("roundtable_encoding_error", labels) == 0.375


def test_the_mean_error_is_over_those_who_name_one() -> None:
    def header(error: float | None) -> UpdateHeader:
        digest, short = "0" * 64, "0" * 32
        return UpdateHeader(
            federation="fed",
            update_id=short,
            assignment_id=short,
            job_id=short,
            version=0,
            kind=WorkKind.TRAIN,
            layout_digest=digest,
            frame_bytes=0,
            frame_digest=digest,
            num_examples=1,
            encoding_error=error,
        )

    assert mean_encoding_error([]) is None
    assert mean_encoding_error([header(None)]) is None
    assert mean_encoding_error([header(0.1), header(None), header(0.3)]) == pytest.approx(0.2)
    assert mean_encoding_error([header(MAX_METRIC)] * 3) == pytest.approx(MAX_METRIC)
