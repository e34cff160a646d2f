"""What `status` shows, as plain JSON values. docs/status.md explains every key."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fedcore.jobfile import Job
from fedserver.federation import Federation
from fedserver.rounds.engine import JobEngine
from fedserver.rounds.traffic import Volume
from fedserver.state.records import JobRecord, JobStatus, VersionRecord


def status_of(federation: Federation, enrolled: int, job_id: str = "") -> dict[str, Any]:
    """Return the server's state, with one job or all of them.

    Raises:
        NotFound: no such job.
    """
    jobs = [federation.job(job_id)] if job_id else federation.services.store.jobs()
    return {
        "federation": federation.federation,
        "clients": {"connected": len(federation.fleet.seats), "enrolled": enrolled},
        "jobs": [_job(federation, record) for record in jobs],
    }


def history_of(federation: Federation, job_id: str) -> list[dict[str, Any]]:
    """Return a row for each version of a job, the oldest first."""
    return [_version(record) for record in federation.services.store.versions(job_id)]


def _job(federation: Federation, record: JobRecord) -> dict[str, Any]:
    job = Job.from_json(record.spec)
    engine = federation.engines.get(record.job_id)
    return {
        "job_id": record.job_id,
        "name": record.name,
        "rounds": job.job.rounds,
        "submitted_at": record.submitted_at,
        "base_digest": record.base_digest,
        "adapter_sha256": record.adapter_blob,
        "privacy": _privacy(record, engine),
        **(_ended(federation, record) if engine is None else _running(federation, engine)),
    }


def _privacy(record: JobRecord, engine: JobEngine | None) -> dict[str, Any] | None:
    """Return what a private job has spent; of one that has ended, what it had spent then."""
    if engine is not None and engine.books.spending is not None:
        return engine.books.spending.as_json()
    if record.privacy is None:
        return None
    tree: dict[str, Any] = json.loads(record.privacy)
    return tree if record.status is JobStatus.RUNNING else {**tree, "epsilon_at_end": tree["epsilon"]}


def _ended(federation: Federation, record: JobRecord) -> dict[str, Any]:
    versions = federation.services.store.versions(record.job_id)
    return {
        "status": record.status.value,
        "failure": record.failure,
        "finished_at": record.finished_at,
        "phase": record.status.value,
        "version": versions[-1].version if versions else None,
        **asdict(Volume.of(versions)),
        "latest": _version(versions[-1]) if versions else None,
        "evaluated": next((_version(row) for row in reversed(versions) if row.metrics != "{}"), None),
    }


def _running(federation: Federation, engine: JobEngine) -> dict[str, Any]:
    state, now_s = engine.state, federation.services.clock.now_s()
    job, waiting, seats = engine.job, state.waiting_for(), federation.fleet.seats
    return {
        "status": engine.record.status.value,
        "failure": engine.record.failure,
        "finished_at": engine.record.finished_at,
        "stage": state.stage.value,
        "phase": state.phase.value,
        "phase_age_s": round(now_s - state.since_s, 3),
        "deadline_in_s": round(max(0.0, state.deadline_s - now_s), 3),
        "attempt": state.attempt,
        "fitting_clients": sum(engine.fits(seat.hello) for seat in seats.values()),
        "needs": {
            "task": job.task.name,
            "adapter": job.adapter.name,
            "codecs": sorted({stage.codec for stage in (*job.compression.uplink, *job.compression.downlink)}),
        },
        "version": None if engine.latest is None else engine.latest.version,
        "waiting_for": {"what": waiting.kind, "missing": waiting.missing, "clients": list(waiting.clients)},
        "working": [
            {
                "client": client,
                "connected": client in seats,
                "progress": round(seats[client].progress, 3) if client in seats else None,
            }
            for client in sorted(state.working)
        ],
        "accepted": len(state.accepted),
        "last_decline": None if engine.last_decline is None else asdict(engine.last_decline),
        **asdict(engine.traffic.before + engine.traffic.recent),
        "latest": None if engine.latest is None else _version(engine.latest),
        "evaluated": None if engine.evaluated is None else _version(engine.evaluated),
    }


def _version(record: VersionRecord) -> dict[str, Any]:
    return {
        "version": record.version,
        "created_at": record.created_at,
        "num_updates": record.num_updates,
        "num_examples": record.num_examples,
        **asdict(Volume() + record),
        "encoding_error": record.encoding_error,
        "epsilon": record.epsilon,
        "clip": record.clip,
        "sha256": record.state_blob,
        "evaluation": json.loads(record.metrics),
    }
