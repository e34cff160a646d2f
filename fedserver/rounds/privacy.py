"""A private job's ledger on the server: what its clients have let out, and what that may come to.

A release is journaled before anything is computed from it, so what a version shows has been counted, whenever the
process dies. It counts for every client whose update is in it, and where clients hide what they send from the server,
for every client that was asked and has not declined: what it has sent may have come too late, but it was sent.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from fedcore.jobfile import Job
from fedcore.layout import Layout
from fedcore.messages import WorkKind
from fedcore.privacy import DpFedAvg, PrivacySection, RqmPrivacy
from fedcore.rng import derive_seed
from fedprivacy.events import History, Release, make
from fedprivacy.guarantee import Guarantee
from fedprivacy.jobs import Accounting, Round
from fedprivacy.ledger import Ledger
from fedserver.rounds.attempt import Attempt
from fedserver.state.base import Store
from fedserver.state.records import ReleaseRecord

RELEASING = (WorkKind.GRADIENT, WorkKind.TRAIN)
"""Work that data goes into; figures of held-out examples are nothing that anybody accounts for."""


@dataclass(frozen=True)
class Spending:
    """What a job has spent.

    Attributes:
        now: the guarantee of the client that has released most.
        at_end: epsilon if that client is in every version yet to come, with as few others as the quorum.
        budget: what may be spent; None: there is no bound.
        unsafe_seed: what all draws follow from, so that nothing is hidden; None: nobody can repeat them.
    """

    now: Guarantee
    at_end: float
    budget: float | None
    unsafe_seed: int | None

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; infinity is null."""
        tree = self.now.as_json()
        return {
            "epsilon": tree["epsilon"],
            "delta": self.now.delta,
            "epsilon_at_end": None if self.at_end == float("inf") else self.at_end,
            "epsilon_budget": self.budget,
            "unsafe_seed": self.unsafe_seed,
            "guarantee": tree,
        }


def uncovered_by(section: PrivacySection) -> tuple[str, ...]:
    """Return what a job's own settings let out beside what is accounted for."""
    found = []
    if section.unsafe_seed is not None:
        found.append(f"anything at all from who knows the seed {section.unsafe_seed}, which all draws follow from")
    if section.evaluation:
        found.append("held-out examples: figures of them are sent as they are")
    return tuple(found)


def cohort_seed(job: Job) -> int:
    """Return what cohorts are drawn from: the job's seed, which all clients know, or what nobody does."""
    section = job.privacy
    if not isinstance(section, DpFedAvg) or not section.secret_cohort:
        return job.job.seed
    return secrets.randbits(62) if section.unsafe_seed is None else derive_seed(section.unsafe_seed, "cohorts")


class JobPrivacy:
    """See the module's text. Epsilons take up to seconds: what computes them is called in a worker thread.

    Args:
        accounting: of the job.
        job_id: of the job.
    """

    def __init__(self, accounting: Accounting, job_id: str) -> None:
        self.accounting, self.job_id = accounting, job_id
        self._records: dict[tuple[int, int, WorkKind], ReleaseRecord] = {}
        self._ledger = Ledger(accounting.history())
        self._delta = accounting.section.delta

    @staticmethod
    def recovered(accounting: Accounting, store: Store, job_id: str) -> JobPrivacy:
        """Return the ledger as the journal has it."""
        found = JobPrivacy(accounting, job_id)
        for record in store.releases(job_id):
            found.add(record)
        return found

    def record(
        self, attempt: Attempt, layout: Layout, store: Store, wall_s: float, *, in_version: bool
    ) -> ReleaseRecord | None:
        """Return what is to be journaled of a sealed attempt; None: it has let nothing out.

        Args:
            attempt: of `RELEASING` work.
            layout: of the job.
            store: holds its assignments.
            wall_s: now.
            in_version: whether a version is made of it, or it is given up.
        """
        row, clients = attempt.record, set(attempt.headers) if in_version else set()
        if self.accounting.is_local:
            place = row.job_id, row.version, row.attempt, row.kind
            clients = {each.client for each in store.assignments(*place) if each.ended != "declined"}
        if not clients:
            return None
        who = Round(len(clients), len(attempt.assignments), row.available)
        names, released = (
            json.dumps(self.accounting.charged(clients)),
            self._release(row.kind, layout, who).model_dump_json(),
        )
        return ReleaseRecord(row.job_id, row.version, row.attempt, row.kind, names, released, wall_s)

    def add(self, record: ReleaseRecord) -> None:
        """Count what is journaled. An attempt that a restart has interrupted may come a second time: it is one."""
        key = record.version, record.attempt, record.kind
        is_new, self._records[key] = key not in self._records, record
        if not is_new:
            self._ledger = Ledger(self.accounting.history())
        for each in [record] if is_new else self._records.values():
            self._ledger.add(json.loads(each.clients), make(Release, json.loads(each.released), "release"))

    def excess(self, kind: WorkKind, layout: Layout, clients: Collection[str], available: int) -> str:
        """Return why a round with these clients would exceed the budget; empty: it would not."""
        budget = self.accounting.section.epsilon
        if budget is None:
            return ""
        schedule = self.accounting.job.schedule
        who = Round(min(schedule.updates_at_deadline, len(clients)), len(clients), available)
        then = self.accounting.history(self._release(kind, layout, who))
        charged = self.accounting.charged(clients)
        after = self._ledger.worst(self._delta, charged, then)
        if after.epsilon <= budget:
            return ""
        before = self._ledger.worst(self._delta, charged)
        return (
            f"privacy budget: one more round would bring epsilon from {before.epsilon:.4g} to {after.epsilon:.4g} at"
            f" delta {self._delta:g}, and {budget:g} may be spent"
        )

    def spending(self, layout: Layout | None, rounds_left: int) -> Spending:
        """Return what has been spent, and what the rest of the job would bring it to."""
        section = self.accounting.section
        now = self._ledger.worst(self._delta)
        now = replace(now, not_covered=(*uncovered_by(section), *now.not_covered))
        at_end = now.epsilon
        if rounds_left and (layout is not None or not isinstance(section, RqmPrivacy)):
            dimension = 1 if layout is None else layout.moving.num_values
            at_end = self._ledger.worst(self._delta, then=self._rest(dimension, rounds_left)).epsilon
        return Spending(now, at_end, section.epsilon, section.unsafe_seed)

    def _rest(self, dimension: int, rounds_left: int) -> History:
        rounds = self.accounting.job.job.rounds
        return self.accounting.planned(dimension, rounds_left, with_start=rounds_left == rounds)

    def _release(self, kind: WorkKind, layout: Layout, who: Round) -> Release:
        if kind is WorkKind.GRADIENT:
            return self.accounting.started(who)
        return self.accounting.trained(who, layout.moving.num_values)
