"""What a job's plugin does wrong ends that job: its clients are free again, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedagg import OPTIMIZERS, RULES
from fedagg.base import Capacity, Fold, RuleTraits
from fedagg.weighted_mean import WeightedMean
from fedcore.errors import UpdateResult
from fedcore.jobfile import Job, parse_job
from fedcore.layout import Vector
from fedcore.messages import Assignment, WorkKind
from fedcore.part import Part
from fedcore.plugin import Plugin
from fedcore.registry import Registry
from fedserver.state.records import JobRecord, JobStatus
from tests.support.player import Player, playing
from tests.support.server import TestServer, running_server, small_job
from tests.unit.fedserver.test_federation import ended, member


class BadOptimizer(Plugin):
    name: ClassVar[str] = "bad-optimizer"
    slots: ClassVar[tuple[str, ...]] = ()

    def initial(self, slot: str) -> float:
        return 0.0

    def step(self, mean_D: Vector, slots_D: Mapping[str, Vector], version: int) -> Vector:
        raise ZeroDivisionError("a plugin's bug")


class BadOpening(Plugin):
    name: ClassVar[str] = "bad-opening"
    traits: ClassVar[RuleTraits] = WeightedMean.traits

    def open(self, num_values: int, capacity: Capacity) -> Fold:
        if num_values > 1:  # one value is what a job is tried with when it is submitted
            raise ZeroDivisionError("a plugin's bug")
        return WeightedMean.configure({}).open(num_values, capacity)


class BadFold:
    num_updates = total_weight = 0

    def add(self, parts: Iterable[Part], weight: int) -> None:
        raise ZeroDivisionError("a plugin's bug")

    def clear(self) -> None:
        raise ZeroDivisionError("a plugin's bug")

    def mean_blocks(self, block_values: int = 1) -> Iterator[Vector]:
        return iter(())


class BadAdding(Plugin):
    name: ClassVar[str] = "bad-adding"
    traits: ClassVar[RuleTraits] = WeightedMean.traits

    def open(self, num_values: int, capacity: Capacity) -> Fold:
        return BadFold()


def install(registry: Registry[Any], plugin: type[Plugin], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(registry, "_added", {**registry._added, plugin.name: plugin})


def job_with(section: str, **values: Any) -> Job:
    return parse_job(small_job().model_dump(mode="json") | {section: values}, "bad")


async def finish(server: TestServer, player: Player, job_id: str) -> None:
    """Do all the work of a job that goes well."""
    while True:
        work = await player.next_work()
        if work.job_id != job_id:
            continue
        assert (await player.answer(work)).result is UpdateResult.ACCEPTED
        if work.kind is WorkKind.EVALUATE:
            await ended(server, job_id)
            return


@pytest.mark.parametrize(
    ("plugin", "section", "values"),
    [
        (BadOptimizer, "server_optimizer", {"name": "bad-optimizer"}),
        (BadOpening, "aggregator", {"rule": "bad-opening"}),
        (BadAdding, "aggregator", {"rule": "bad-adding"}),
    ],
)
async def test_a_plugins_bug_fails_its_job_and_frees_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: type[Plugin], section: str, values: dict[str, Any]
) -> None:
    install(OPTIMIZERS if plugin is BadOptimizer else RULES, plugin, monkeypatch)
    async with running_server(tmp_path) as server:
        transport, identity = await member(server, "alice")
        bad = await server.federation.submit(job_with(section, **values).to_json())
        async with playing(transport, identity.signing_key) as player:
            assert (await player.answer(await player.next_work())).result is UpdateResult.ACCEPTED
            if plugin is not BadOpening:
                work = await player.next_work()
                state = await player.answer(work)
                if plugin is BadAdding:
                    assert state.result is UpdateResult.TOO_LATE
                    assert "the job has failed" in state.text
            await ended(server, bad.job_id)
            record = server.federation.job(bad.job_id)
            assert record.status is JobStatus.FAILED
            assert "ZeroDivisionError" in record.failure
            assert server.federation.fleet.seats["alice"].work == ""
            good = await server.federation.submit(small_job().to_json())
            await finish(server, player, good.job_id)
            assert server.federation.job(good.job_id).status is JobStatus.FINISHED


async def test_a_job_whose_plugin_is_gone_after_a_restart_fails_and_the_server_starts(tmp_path: Path) -> None:
    spec = job_with("aggregator", rule="uninstalled").to_json()
    found = JobRecord("a" * 32, "small", spec, JobStatus.RUNNING, submitted_at=0.0)
    async with running_server(tmp_path, found=[found]) as server:
        record = server.federation.job(found.job_id)
        assert record.status is JobStatus.FAILED
        assert "unknown aggregation rule 'uninstalled'" in record.failure


async def test_stopping_a_job_frees_its_clients_at_once(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        transport, identity = await member(server, "alice")
        first = await server.federation.submit(small_job().to_json())
        async with playing(transport, identity.signing_key) as player:
            await player.next_work()
            assert (await server.federation.stop_job(first.job_id)).status is JobStatus.STOPPED
            second = await server.federation.submit(small_job().to_json())
            order = await player.next_order()  # the cancellation
            assert not isinstance(order, Assignment)
            await finish(server, player, second.job_id)
