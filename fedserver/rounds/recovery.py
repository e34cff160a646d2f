"""After a restart: what the journal says about a job that was running."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from fedcore.errors import UpdateResult
from fedcore.layout import Layout
from fedcore.messages import UpdateHeader, WorkKind
from fedserver.rounds.attempt import Attempt, split_spool_key
from fedserver.rounds.counted import Counted
from fedserver.rounds.plan import Plan
from fedserver.rounds.privacy import JobPrivacy, cohort_seed
from fedserver.rounds.scheduler import Scheduler, stage_after
from fedserver.rounds.services import Services
from fedserver.rounds.traffic import Volume
from fedserver.state.records import AttemptRecord, JobRecord, VersionRecord
from fedserver.state.vault import passing


class Recovered(NamedTuple):
    """Where the job goes on; `attempt` is None when nothing was open.

    `volume` counts up to the newest version: bytes of a round that a restart interrupted are not in it.
    """

    latest: VersionRecord | None
    scheduler: Scheduler
    attempt: Attempt | None
    volume: Volume
    counted: Counted
    privacy: JobPrivacy | None


def recover(record: JobRecord, plan: Plan, layout: Layout | None, services: Services) -> Recovered:
    """Read a running job's state, and fold again what had been accepted for the open version.

    Because folding is exact, the sum is bit for bit the one that was lost. What the job goes on from is compared with
    its digest: nobody knows what has happened to the disk since. Runs in a worker thread.

    Raises:
        StateUnusable: a blob is damaged or missing; nothing has been written.
    """
    store, job = services.store, plan.job
    latest = store.latest_version(record.job_id)
    if latest is not None:
        named = (latest.state_blob, latest.frame_body, latest.optimizer_blob, latest.basis_blob)
        for digest in dict.fromkeys((*named, *services.vault.changes(latest))):
            if digest is not None:
                services.vault.check(digest, f"version {latest.version} of job {record.job_id}")
    elif record.adapter_blob is not None:
        services.vault.check(record.adapter_blob, f"the adapter that job {record.job_id} starts from")
    from_gradient = plan.start is not None
    stage, version = stage_after(None if latest is None else latest.version, job.job.rounds, from_gradient)
    tried = [row for row in store.attempts(record.job_id) if row.kind is stage and row.version == version]
    attempt = _reopen(tried[-1], plan, layout, services) if tried and not tried[-1].outcome else None
    scheduler = Scheduler.resume(
        job.schedule,
        job.job.rounds,
        cohort_seed(job),
        services.clock.now_s(),
        latest_version=None if latest is None else latest.version,
        attempt=len(tried) if attempt is None else attempt.record.attempt,
        working=() if attempt is None else attempt.unfinished(),
        accepted=() if attempt is None else attempt.headers,
        # Every other stage that has closed has made a version, and another one came after it.
        is_over=bool(tried) and tried[-1].outcome == "closed",
        from_gradient=from_gradient,
    )
    volume = Volume.of(store.versions(record.job_id))
    counted = Counted.recovered(job, store, record.job_id)
    privacy = None if plan.accounting is None else JobPrivacy.recovered(plan.accounting, store, record.job_id)
    return Recovered(latest, scheduler, attempt, volume, counted, privacy)


def _reopen(record: AttemptRecord, plan: Plan, layout: Layout | None, services: Services) -> Attempt:
    store = services.store
    is_summed = record.kind is WorkKind.TRAIN and layout is not None
    fold = plan.open_fold(layout.moving.num_values) if is_summed and layout is not None else None
    attempt = Attempt(record, services.clock.now_s(), fold)
    for assignment in store.assignments(record.job_id, record.version, record.attempt, record.kind):
        attempt.assignments[assignment.assignment_id] = assignment
        if assignment.ended:
            attempt.ended.add(assignment.assignment_id)
    for update in store.updates(record.job_id, record.version, record.attempt, record.kind):
        if update.result is not UpdateResult.ACCEPTED:
            continue
        header = UpdateHeader.from_bytes(update.header)
        attempt.accept(update.client, header, update.blob)
        if update.blob is not None:
            services.vault.check(update.blob, f"the update of {update.client!r} in job {record.job_id}")
        if fold is not None and layout is not None and update.blob is not None:
            frame = services.vault.open(update.blob)
            parts = plan.parts(frame, layout, update.client, record.version)
            fold.add(passing(parts, frame), plan.weight_of(header))
    for key in services.blobs.spools():
        if split_spool_key(key)[0] in attempt.assignments:
            attempt.spools[key] = asyncio.Lock()
    return attempt
