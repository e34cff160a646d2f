"""What a client knows of the jobs that it works for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedclient.declining import Declined
from fedclient.guard import Guard
from fedclient.trainer import Work
from fedclient.worker import Worker
from fedcodec import Pipeline, build_pipeline
from fedcore.jobfile import CodecStage, Job
from fedcore.layout import Layout
from fedcore.messages import Assignment
from fedcore.sending import Sending
from fedprivacy.jobs import Accounting
from fedprivacy.order import disorder_of

MAX_JOBS: Final = 4
"""Jobs whose models, data and newest frames stay in memory. Nobody tells a client that a job is over."""


@dataclass(frozen=True)
class JobPlan:
    """What a client knows of a job; `spec` is the job as it came.

    `revision` is that of the frozen matrices here, after the changes up to version `changed_to`; None: a change of them
    broke off half way.
    """

    spec: bytes
    job: Job
    layout: Layout
    sending: Sending
    downlink: Pipeline
    uplink: Pipeline
    basis_digest: str
    base_digest: str | None
    revision: str | None = ""
    changed_to: int = 0


class Plans:
    """Jobs by id, made ready once and kept while they are in use.

    Args:
        worker: builds and forgets their models.
        client: this client's name.
        guard: refuses jobs.
    """

    def __init__(self, worker: Worker, client: str, guard: Guard) -> None:
        self._worker, self._client, self._guard = worker, client, guard
        self._plans: OrderedDict[str, JobPlan | None] = OrderedDict()  # None: known, not planned yet

    def of(self, assignment: Assignment) -> JobPlan:
        """Return the plan of the assignment's job.

        Raises:
            InvalidInput, Declined: the job is not valid, names what is not installed here or is for another base model,
                this client computes another layout than the server has, or its owner's policy refuses the work.
            StateUnusable, StorageFailed: see `Guard.check_budget`.
        """
        plan = self._plans.get(assignment.job_id)
        if plan is not None and plan.spec == assignment.job:
            self._guard.check(assignment, plan.job)
        else:
            job = Job.from_json(assignment.job)
            self._guard.check(assignment, job)
            self._guard.check_budget(assignment, job, 1)  # before data is read; the whole of it follows
            if plan is not None:  # another job under this id: its model is not the one that was built
                self._worker.forget(assignment.job_id)
            work, compression = self.work(assignment, job), job.compression
            layout, basis = self._worker.layout(work), self._worker.basis_digest(work)
            pipelines = _pipeline(compression.downlink), _pipeline(compression.uplink)
            base = self._worker.base_digest(work)
            plan = JobPlan(assignment.job, job, layout, Sending.of(job.adapter), *pipelines, basis, base)
            if compression.error_feedback is not None and plan.uplink.traits.private_draws:
                raise Declined("error feedback would take back what the uplink hides by its draws")
            if (accounting := Accounting.of(job)) is not None and (
                disorder := disorder_of(accounting, plan.uplink.stages)
            ):
                raise Declined("; ".join(disorder))
            self._plans[assignment.job_id] = plan
        if plan.layout.digest != assignment.layout_digest:
            raise Declined(
                f"this client computes layout {plan.layout.digest}, the server has {assignment.layout_digest}: "
                "task, adapter or their versions differ"
            )
        check_base(assignment, plan.base_digest)
        self._guard.check_budget(assignment, plan.job, self.dimension(assignment, plan))
        return plan

    def dimension(self, assignment: Assignment, plan: JobPlan) -> int:
        """Return how many values this client's update has."""
        return sum(plan.sending.layout(plan.layout, self._client, assignment.version).sizes)

    def put(self, assignment: Assignment, plan: JobPlan) -> None:
        """Replace the plan of the assignment's job."""
        self._plans[assignment.job_id] = plan

    def work(self, assignment: Assignment, job: Job) -> Work:
        """Return what the worker is given; of more than `MAX_JOBS` jobs, it forgets the one unused for longest."""
        self._plans.setdefault(assignment.job_id, None)
        self._plans.move_to_end(assignment.job_id)
        while len(self._plans) > MAX_JOBS:
            self._worker.forget(self._plans.popitem(last=False)[0])
        return Work(assignment.job_id, job, assignment.version, self._client, assignment.seed)


def check_base(assignment: Assignment, own: str | None) -> None:
    """Decline work for another base model than this client's; a job may not say which one it is for."""
    if assignment.base_digest in ("", own):
        return
    if own is None:
        raise Declined(
            f"the job is for a base model with digest {assignment.base_digest}, and nothing is frozen of this client's"
        )
    raise Declined(
        f"this client's base model has digest {own}, the job's has {assignment.base_digest}: weights that are not"
        " trained differ; use the same revision of the model's files as the others, which `fedclient base` compares"
    )


def _pipeline(stages: Sequence[CodecStage]) -> Pipeline:
    return build_pipeline([stage.model_dump(mode="json") for stage in stages])
