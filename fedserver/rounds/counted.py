"""Which version holds a client's newest update: for jobs with error feedback, to be told with the work."""

from __future__ import annotations

from collections.abc import Iterable

from fedcore.errors import UpdateResult
from fedcore.jobfile import Job
from fedcore.messages import WorkKind
from fedserver.state.base import Store


class Counted:
    """Versions by client, as far back as the job's error feedback reaches; of a job without any it knows none.

    It follows from the journal, so that a client hears the same from a server that was killed.
    """

    def __init__(self, job: Job) -> None:
        feedback = job.compression.error_feedback
        self._max_age = 0 if feedback is None else feedback.max_age
        self._newest: dict[str, int] = {}

    @staticmethod
    def recovered(job: Job, store: Store, job_id: str) -> Counted:
        """Find all of it in the journal."""
        found = Counted(job)
        if job.compression.error_feedback is None:
            return found
        closed = [row for row in store.attempts(job_id) if row.kind is WorkKind.TRAIN and row.outcome == "closed"]
        for attempt in closed[-found._max_age :]:  # a version has one attempt that closed
            rows = store.updates(job_id, attempt.version, attempt.attempt, WorkKind.TRAIN)
            found.add(attempt.version + 1, [row.client for row in rows if row.result is UpdateResult.ACCEPTED])
        return found

    def add(self, version: int, clients: Iterable[str]) -> None:
        """Note whose updates are in a version; called with one after the other."""
        if self._max_age:
            self._newest |= dict.fromkeys(clients, version)
            self._newest = {client: newest for client, newest in self._newest.items() if self._reaches(newest, version)}

    def of(self, client: str, version: int) -> int:
        """Return the newest version up to `version` that holds an update of this client; 0: none in reach."""
        newest = self._newest.get(client, 0)
        return newest if self._reaches(newest, version) else 0

    def _reaches(self, newest: int, version: int) -> bool:
        """Whether what a client left out of its update in `newest` is young enough for work on `version`."""
        base = newest - 1  # what the update was computed from
        return version - base <= self._max_age
