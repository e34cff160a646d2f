"""What of a job's model stays as the server says, brought to what an assignment names: basis, changes of the base."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

import numpy as np

from fedclient.declining import Declined, declining
from fedclient.plans import JobPlan, Plans
from fedclient.worker import Worker
from fedcore.changes import begin_again, max_change_bytes, max_changes, next_revision
from fedcore.messages import Assignment
from fedcore.rng import stream

BEGINS_ANEW: Final = "flora"
"""The rule whose versions have new factors, drawn from the job's seed."""


class Frozen:
    """Says what has to be downloaded, and takes it. Every method is called on the worker thread."""

    def __init__(self, worker: Worker, plans: Plans) -> None:
        self._worker, self._plans = worker, plans

    def known_frame(self, assignment: Assignment) -> memoryview | None:
        """Return the version's frame where a client can make it itself: all factors of `flora` begin anew.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            if plan.job.aggregator.rule != BEGINS_ANEW or not assignment.version:
                return None
            values_D = begin_again(plan.layout, plan.job.job.seed, assignment.version - 1)
            if values_D is None:
                return None
            rng = stream(plan.job.job.seed, "downlink", assignment.version)
            frame = b"".join(plan.downlink.parts(values_D, rng, plan.layout.moving.sizes))
            return memoryview(frame) if hashlib.sha256(frame).hexdigest() == assignment.frame_digest else None

    def basis_bytes(self, assignment: Assignment) -> int:
        """Return how long a basis is that has to be downloaded first; 0: there is none, or it is here.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            is_here = assignment.basis_digest in ("", plan.basis_digest)
            return 0 if is_here else 4 * plan.layout.num_basis_values

    def set_basis(self, assignment: Assignment, basis: memoryview) -> None:
        """Take a downloaded basis.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`, or it is not the one that was announced.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            found = hashlib.sha256(basis).hexdigest()
            if found != assignment.basis_digest:
                raise Declined(f"the basis has digest {found}, {assignment.basis_digest} was announced")
            self._worker.set_basis(self._plans.work(assignment, plan.job), np.frombuffer(basis, dtype="<f4"))
            self._plans.put(assignment, replace(plan, basis_digest=found))

    def missing_changes(self, assignment: Assignment) -> tuple[range, int]:
        """Return the versions whose changes of the frozen matrices are not made here yet, and what one has at most.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            if assignment.base_revision == plan.revision:
                return range(0), 0
            goes_on = plan.revision and assignment.changed_since <= plan.changed_to < assignment.version
            if not goes_on and plan.revision != "":
                self._restore(assignment, plan)
            first = plan.changed_to + 1 if goes_on else max(1, assignment.changed_since)
            missing = range(first, assignment.version + 1 if assignment.base_revision else 1)
            if len(missing) > (most := max_changes(plan.layout)):
                raise Declined(f"{len(missing)} changes of frozen matrices are missing, there can be {most}")
            return missing, max_change_bytes(plan.layout)

    def change_base(self, assignment: Assignment, version: int, change: memoryview) -> None:
        """Make one of the `missing_changes`; they are made in order.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`, or it is malformed, or with the last one the frozen matrices
                are not what was announced.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            work = self._plans.work(assignment, plan.job)
            revision = next_revision(plan.revision or "", hashlib.sha256(change).hexdigest())
            # Unknown until it is made: what breaks off half way is not made a second time, but taken back.
            self._plans.put(assignment, replace(plan, revision=None))
            if version == assignment.version and revision != assignment.base_revision:
                text = f"have revision {revision}, {assignment.base_revision} was announced"
                raise Declined(f"the frozen matrices {text}")
            self._worker.change_base(work, change)
            self._plans.put(assignment, replace(plan, revision=revision, changed_to=version))

    def _restore(self, assignment: Assignment, plan: JobPlan) -> None:
        """Make the frozen matrices what they were in the beginning."""
        self._plans.put(assignment, replace(plan, revision=None))
        self._worker.restore_base(self._plans.work(assignment, plan.job))
        self._plans.put(assignment, replace(plan, revision="", changed_to=0))

    def check(self, assignment: Assignment) -> None:
        """Check that all is here.

        Raises:
            Declined: as for `UpdateMaker.max_frame_bytes`, or it is not.
        """
        plan = self._plans.of(assignment)
        if assignment.basis_digest not in ("", plan.basis_digest):
            raise Declined(f"the basis {assignment.basis_digest} is not here")
        if assignment.base_revision != plan.revision:
            raise Declined(f"the frozen matrices of revision {assignment.base_revision} are not here")
