"""What a job tells of itself: phases to metrics, events to the log."""

from __future__ import annotations

import logging

from fedserver.metrics import Metrics
from fedserver.rounds.attempt import Attempt
from fedserver.rounds.scheduler import Phase, Scheduler
from fedserver.state.records import JobStatus

log = logging.getLogger(__name__)


class Reports:
    """Speaks for one job. Used on the event loop's thread."""

    def __init__(self, job_id: str, metrics: Metrics) -> None:
        self._job_id, self._metrics = job_id, metrics

    def state(self, state: Scheduler, *, entered: bool) -> None:
        """Show where the job is, and with `entered` that it has just come there."""
        waiting = state.waiting_for()
        if entered:
            phase = state.stage.value if state.phase is Phase.OPEN else state.phase.value
            self._metrics.phase(self._job_id, phase)
        missing = {waiting.kind: waiting.missing}
        self._metrics.waiting(self._job_id, clients=missing.get("clients", 0), updates=missing.get("updates", 0))

    def ended(self, status: JobStatus, failure: str) -> None:
        """Show that the job is over."""
        self._metrics.phase(self._job_id, "finished" if status is JobStatus.FINISHED else "failed")
        self._metrics.waiting(self._job_id, clients=0, updates=0)
        log.info("job ended", extra={"job": self._job_id, "status": status, "failure": failure})

    def event(self, event: str, attempt: Attempt, **fields: object) -> None:
        """Log what has become of an attempt."""
        where = {
            "job": self._job_id,
            "kind": attempt.kind.value,
            "version": attempt.version,
            "attempt": attempt.record.attempt,
        }
        log.info(event, extra={**where, **fields})
