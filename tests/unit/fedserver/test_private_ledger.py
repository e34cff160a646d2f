"""A private job's ledger on the server: who is charged for what, and that it only grows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from fedcore.jobfile import parse_job
from fedcore.messages import UpdateHeader, WorkKind
from fedprivacy.jobs import EVERYBODY, Accounting
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.privacy import JobPrivacy
from fedserver.state.memory import MemoryStore
from fedserver.state.records import AssignmentRecord, AttemptRecord, ReleaseRecord
from tests.support.player import LAYOUT

DIGEST = "ab" * 32
SERVER = {"mechanism": "dp-fedavg", "clip": 1.0, "noise_multiplier": 2.0}
LOCAL = {**SERVER, "noise": "local"}


def accounting(**privacy: Any) -> Accounting:
    tree = {
        "job": {"name": "x", "rounds": 5},
        "task": {"name": "t"},
        "schedule": {"cohort": 4},
        "privacy": {"delta": 1e-3, **privacy},
    }
    found = Accounting.of(parse_job(tree, "x"))
    assert found is not None
    return found


def tried(store: MemoryStore, ended: Mapping[str, str], accepted: str = "", version: int = 0) -> Attempt:
    """Return a sealed attempt that has asked those in `ended`, which says what came of it."""
    found = Attempt(AttemptRecord("j", version, 0, WorkKind.TRAIN, 0.0, 1.0, available=9), 0.0, None)
    for index, (client, outcome) in enumerate(ended.items()):
        key = f"{version:016x}{index:016x}"
        row = AssignmentRecord(key, "j", version, 0, WorkKind.TRAIN, client, 0.0)
        found.assignments[key] = row
        store.write([replace(row, ended=outcome)])
        if client in accepted.split():
            found.headers[client] = UpdateHeader(
                federation="f",
                update_id=key,
                assignment_id=key,
                job_id="0" * 32,
                version=version,
                kind=WorkKind.TRAIN,
                layout_digest=DIGEST,
                frame_bytes=0,
                frame_digest=DIGEST,
                num_examples=1,
            )
    return found


def record(privacy: JobPrivacy, store: MemoryStore, attempt: Attempt, *, in_version: bool = True) -> ReleaseRecord:
    made = privacy.record(attempt, LAYOUT, store, 1.0, in_version=in_version)
    assert made is not None
    return made


ENDED = {"ann": "done", "bob": "declined", "cleo": "expired", "dan": "lost", "eve": "done"}


@pytest.mark.parametrize(
    ("privacy", "charged"),
    [
        (SERVER, ["ann", "eve"]),
        ({**SERVER, "noise": "clients"}, ["ann", "eve"]),
        ({**SERVER, "secret_cohort": True}, [EVERYBODY]),
        # What the server may have seen, late or not.
        (LOCAL, ["ann", "cleo", "dan", "eve"]),
    ],
)
def test_who_is_charged_for_a_version(privacy: dict[str, Any], charged: list[str]) -> None:
    store = MemoryStore()
    attempt = tried(store, ENDED, "ann eve")
    made = record(JobPrivacy(accounting(**privacy), "j"), store, attempt)
    assert json.loads(made.clients) == charged


def test_what_is_given_up_costs_only_where_the_server_is_not_trusted() -> None:
    store = MemoryStore()
    attempt = tried(store, {"ann": "done", "bob": "expired"}, "ann")
    trusted, local = (JobPrivacy(accounting(**each), "j") for each in (SERVER, LOCAL))
    assert trusted.record(attempt, LAYOUT, store, 1.0, in_version=False) is None
    assert json.loads(record(local, store, attempt, in_version=False).clients) == ["ann", "bob"]
    everybody_declined = tried(store, {"ann": "declined", "bob": "declined"}, version=1)
    assert local.record(everybody_declined, LAYOUT, store, 1.0, in_version=False) is None


def test_the_journal_gives_the_same_ledger() -> None:
    store, privacy = MemoryStore(), JobPrivacy(accounting(**LOCAL), "j")
    spent = [privacy.spending(LAYOUT, 5).now.epsilon]
    for version in range(4):
        names = {"ann": "done", **({"bob": "expired"} if version % 2 else {})}
        made = record(privacy, store, tried(store, names, "ann", version))
        store.write([made])
        privacy.add(made)
        spent.append(privacy.spending(LAYOUT, 4 - version).now.epsilon)
    assert spent == sorted(set(spent))
    recovered = JobPrivacy.recovered(accounting(**LOCAL), store, "j")
    for left in (0, 1):
        assert recovered.spending(LAYOUT, left) == privacy.spending(LAYOUT, left)


def test_an_attempt_that_closes_again_after_a_crash_counts_once_and_for_all_who_were_in_it() -> None:
    store, privacy = MemoryStore(), JobPrivacy(accounting(**SERVER), "j")
    names = dict.fromkeys(["ann", "bob"], "done")
    first, again = (record(privacy, store, tried(store, names, who)) for who in ("ann", "ann bob"))
    privacy.add(first)
    once = privacy.spending(LAYOUT, 0).now
    privacy.add(again)
    assert privacy.spending(LAYOUT, 0).now == once
    privacy.add(replace(again, attempt=1))  # another attempt is another release
    assert privacy.spending(LAYOUT, 0).now.epsilon > once.epsilon


def test_the_budget_looks_at_those_who_are_to_be_asked() -> None:
    store = MemoryStore()
    free = JobPrivacy(accounting(**SERVER), "j")
    costs = [free.spending(LAYOUT, left).at_end for left in (1, 2)]
    privacy = JobPrivacy(accounting(**SERVER, epsilon=(costs[0] + costs[1]) / 2), "j")
    privacy.add(record(privacy, store, tried(store, {"ann": "done", "bob": "declined"}, "ann")))
    assert privacy.excess(WorkKind.TRAIN, LAYOUT, ["bob", "cleo"], 4) == ""
    assert f"from {costs[0]:.4g} to {costs[1]:.4g} at delta 0.001" in privacy.excess(
        WorkKind.TRAIN, LAYOUT, ["ann", "bob"], 4
    )
