"""From an assignment to a signed update: everything that computes, and nothing that waits.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedclient.declining import Declined, declining
from fedclient.pieces import Pieces
from fedclient.residuals import Residuals, corrected, encoding_error
from fedclient.trainer import Evaluation, Work
from fedclient.worker import Worker
from fedcodec import Pipeline, build_pipeline
from fedcore.adapters import LoraSbParams, gradient_layout
from fedcore.changes import begin_again, max_change_bytes, next_revision
from fedcore.draws import Draws, PrivateDraws
from fedcore.errors import FedError
from fedcore.identity import sign
from fedcore.jobfile import CodecStage, Job
from fedcore.layout import Layout, Vector
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, UpdateHeader, WorkKind
from fedcore.params import parse_params
from fedcore.rng import stream
from fedcore.sending import Sending

RAW: Final = build_pipeline([{"codec": "raw"}])
BEGINS_ANEW: Final = "flora"
"""The rule whose versions have new factors, drawn from the job's seed."""
MAX_JOBS: Final = 4
"""Jobs whose models, data and newest frames stay in memory. Nobody tells a client that a job is over."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What is sent; `header` is the very bytes that were signed."""

    update_id: str
    header: bytes
    signature: bytes
    frame: Pieces


@dataclass(frozen=True)
class _Plan:
    """What is known of a job; `spec` is the job as it came.

    `revision` is that of the frozen matrices here, after the changes up to version `changed_to`.
    """

    spec: bytes
    job: Job
    layout: Layout
    sending: Sending
    downlink: Pipeline
    uplink: Pipeline
    basis_digest: str
    base_digest: str | None
    revision: str = ""
    changed_to: int = 0


class Encoded(NamedTuple):
    """An encoded difference; `error` as in `UpdateHeader.encoding_error`."""

    frame: Pieces
    error: float | None


class UpdateMaker:
    """Turns assignments into updates. Synchronous; every method is called on the worker thread.

    The same assignment, version and data give the same bytes, so an update that is made twice counts once.

    Args:
        worker: trains and evaluates.
        signing_key: signs headers, and is what draws that hide something follow from.
        federation: the server that updates are for.
        client: this client's name.
        residuals: keeps what encoding leaves out, for jobs with error feedback.
    """

    def __init__(
        self, worker: Worker, signing_key: Ed25519PrivateKey, federation: str, client: str, residuals: Residuals
    ) -> None:
        self._worker = worker
        self._residuals = residuals
        self._signing_key = signing_key
        self._federation = federation
        self._client = client
        self._plans: OrderedDict[str, _Plan | None] = OrderedDict()  # None: known, not planned yet

    def initialise(self, assignment: Assignment) -> Update:
        """Return version 0 as a raw frame, with its layout.

        Raises:
            Declined: the job is not valid, names what is not installed here, asks for another base model, or its code
                failed.
        """
        with declining():
            work = self._work(assignment, Job.from_json(assignment.job))
            layout, values_D = self._worker.initialise(work)
            base_digest = self._worker.base_digest(work)
            _check_base(assignment, base_digest)
            frame = Pieces(*RAW.parts(values_D, stream(assignment.seed, "encode")))
            return self._sign(assignment, layout, frame, rows=json.loads(layout.to_json()), base_digest=base_digest)

    def max_frame_bytes(self, assignment: Assignment) -> int:
        """Check all that can be checked before a download, and return what the frame can have at most.

        Raises:
            Declined: as for `initialise`, or this client computes another layout than the server has.
        """
        with declining():
            plan = self._plan(assignment)
            return plan.downlink.max_frame_bytes(plan.layout.moving.sizes)

    def known_frame(self, assignment: Assignment) -> memoryview | None:
        """Return the version's frame where a client can make it itself: all factors of `flora` begin anew.

        Raises:
            Declined: as for `max_frame_bytes`.
        """
        with declining():
            plan = self._plan(assignment)
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
            Declined: as for `max_frame_bytes`.
        """
        with declining():
            plan = self._plan(assignment)
            return 0 if self._has_basis(assignment, plan) else 4 * plan.layout.num_basis_values

    def set_basis(self, assignment: Assignment, basis: memoryview) -> None:
        """Take a downloaded basis.

        Raises:
            Declined: as for `max_frame_bytes`, or it is not the one that was announced.
        """
        with declining():
            plan = self._plan(assignment)
            found = hashlib.sha256(basis).hexdigest()
            if found != assignment.basis_digest:
                raise Declined(f"the basis has digest {found}, {assignment.basis_digest} was announced")
            self._worker.set_basis(self._work(assignment, plan.job), np.frombuffer(basis, dtype="<f4"))
            self._plans[assignment.job_id] = replace(plan, basis_digest=found)

    def missing_changes(self, assignment: Assignment) -> tuple[range, int]:
        """Return the versions whose changes of the frozen matrices are not made here yet, and what one has at most.

        Raises:
            Declined: as for `max_frame_bytes`.
        """
        with declining():
            plan = self._plan(assignment)
            if assignment.base_revision == plan.revision:
                return range(0), 0
            max_bytes = max_change_bytes(plan.layout)
            if not assignment.changed_since <= plan.changed_to < assignment.version:
                # Other changes than those that this client has made: from the beginning.
                self._worker.restore_base(self._work(assignment, plan.job))
                plan = self._plans[assignment.job_id] = replace(plan, revision="", changed_to=0)
            first = plan.changed_to + 1 if plan.revision else max(1, assignment.changed_since)
            return range(first, assignment.version + 1 if assignment.base_revision else 1), max_bytes

    def change_base(self, assignment: Assignment, version: int, change: memoryview) -> None:
        """Make one of the `missing_changes`; they are made in order.

        Raises:
            Declined: as for `max_frame_bytes`, or it is malformed, or with the last one the frozen matrices are not
                what was announced; then they are what they were in the beginning.
        """
        with declining():
            plan = self._plan(assignment)
            work = self._work(assignment, plan.job)
            revision = next_revision(plan.revision, hashlib.sha256(change).hexdigest())
            try:
                if version == assignment.version and revision != assignment.base_revision:
                    text = f"have revision {revision}, {assignment.base_revision} was announced"
                    raise Declined(f"the frozen matrices {text}")
                self._worker.change_base(work, change)
            except FedError:
                self._worker.restore_base(work)
                self._plans[assignment.job_id] = replace(plan, revision="", changed_to=0)
                raise
            self._plans[assignment.job_id] = replace(plan, revision=revision, changed_to=version)

    def update(
        self,
        assignment: Assignment,
        frame: memoryview,
        progress: Callable[[float], None],
        stop: threading.Event,
    ) -> Update:
        """Decode the version and train on it or measure it.

        Raises:
            Declined: as for `max_frame_bytes`, or the frame is malformed, or the task's code failed.
            Stopped: `stop` was set.
            StorageFailed: what encoding left out cannot be kept, and would be lost.
        """
        with declining():
            plan = self._plan(assignment)
            work = self._work(assignment, plan.job)
            if not self._has_basis(assignment, plan):
                raise Declined(f"the basis {assignment.basis_digest} is not here")
            if assignment.base_revision != plan.revision:
                raise Declined(f"the frozen matrices of revision {assignment.base_revision} are not here")
            base_D = plan.downlink.decode(frame, plan.layout.moving.sizes)
            if assignment.kind is WorkKind.GRADIENT:
                return self._gradient(assignment, plan, work, base_D, stop)
            if assignment.kind is WorkKind.EVALUATE:
                measured = self._worker.evaluate(work, base_D)
                return self._sign(assignment, plan.layout, Pieces(), evaluation=measured)
            trained = self._worker.train(work, base_D, progress=progress, stop=stop)
            encoded = self._encode(assignment, plan, trained.delta_D)
            return self._sign(
                assignment,
                plan.layout,
                encoded.frame,
                encoding_error=encoded.error,
                num_examples=trained.num_examples,
                metrics=trained.metrics,
                evaluation=trained.evaluation,
            )

    def _has_basis(self, assignment: Assignment, plan: _Plan) -> bool:
        return assignment.basis_digest in ("", plan.basis_digest)

    def _gradient(
        self, assignment: Assignment, plan: _Plan, work: Work, base_D: Vector, stop: threading.Event
    ) -> Update:
        """Return the sum of the loss's gradients by the adapted weights, or its signs."""
        params = parse_params(LoraSbParams, plan.job.adapter.params, "adapter")
        found = self._worker.gradient(work, base_D, params.samples, stop=stop)
        rng = stream(assignment.seed, "encode")
        if params.votes:
            # One bit has no zero. A weight without a gradient, such as that of an input that is always 0, must not
            # get everybody's same vote: votes that are drawn cancel out.
            undecided = np.flatnonzero(found.values == 0)
            found.values[undecided] = rng.choice(np.array([-1, 1], dtype=np.float32), undecided.size)
        sizes = gradient_layout(plan.layout).sizes
        frame = Pieces(*build_pipeline([params.gradient_codec]).parts(found.values, rng, sizes))
        measured = self._worker.evaluate(work, base_D)
        return self._sign(assignment, plan.layout, frame, num_examples=found.num_examples, evaluation=measured)

    def _encode(self, assignment: Assignment, plan: _Plan, delta_D: Vector) -> Encoded:
        """Encode what training gave, and for a job with error feedback keep what that leaves out."""
        uplink, feedback = plan.uplink, plan.job.compression.error_feedback
        sizes = plan.sending.layout(plan.layout, self._client, assignment.version).sizes
        rng = self._draws(assignment, uplink, delta_D)
        if uplink.traits.lossless or uplink.traits.private_draws:  # the error would tell of what was drawn
            return Encoded(Pieces(*uplink.parts(delta_D, rng, sizes)), None)
        values_D = delta_D if feedback is None else corrected(self._residuals, feedback, assignment, delta_D)
        # Put together before the values change: pieces may be views of them.
        frame = b"".join(uplink.parts(values_D, rng, sizes))
        error = encoding_error(values_D, uplink.open(frame, sizes), subtract=feedback is not None)
        if feedback is not None and np.isfinite(values_D).all():
            self._residuals.save(assignment.job_id, assignment.version, values_D)
        return Encoded(Pieces(frame), error)

    def _draws(self, assignment: Assignment, uplink: Pipeline, delta_D: Vector) -> Draws:
        """Return what encoding draws from: the job's seed, or where draws hide the values a secret of this client's.

        Secret draws depend on the values and on all of the job: whoever asks for the same work on other values, or
        through other stages, learns nothing from draws that are alike.
        """
        if not uplink.traits.private_draws:
            return stream(assignment.seed, "encode")
        secret, values = self._signing_key.private_bytes_raw(), hashlib.sha256(delta_D.data).digest()
        return PrivateDraws(secret, b"encode", str(assignment.seed).encode(), assignment.job, values)

    def _plan(self, assignment: Assignment) -> _Plan:
        plan = self._plans.get(assignment.job_id)
        if plan is None or plan.spec != assignment.job:
            job = Job.from_json(assignment.job)
            work, compression = self._work(assignment, job), job.compression
            layout, basis = self._worker.layout(work), self._worker.basis_digest(work)
            pipelines = _pipeline(compression.downlink), _pipeline(compression.uplink)
            base = self._worker.base_digest(work)
            plan = _Plan(assignment.job, job, layout, Sending.of(job.adapter), *pipelines, basis, base)
            if compression.error_feedback is not None and plan.uplink.traits.private_draws:
                raise Declined("error feedback would take back what the uplink hides by its draws")
            self._plans[assignment.job_id] = plan
        if plan.layout.digest != assignment.layout_digest:
            raise Declined(
                f"this client computes layout {plan.layout.digest}, the server has {assignment.layout_digest}: "
                "task, adapter or their versions differ"
            )
        _check_base(assignment, plan.base_digest)
        return plan

    def _work(self, assignment: Assignment, job: Job) -> Work:
        self._plans.setdefault(assignment.job_id, None)
        self._plans.move_to_end(assignment.job_id)
        while len(self._plans) > MAX_JOBS:
            self._worker.forget(self._plans.popitem(last=False)[0])
        return Work(assignment.job_id, job, assignment.version, self._client, assignment.seed)

    def _sign(
        self,
        assignment: Assignment,
        layout: Layout,
        frame: Pieces,
        *,
        num_examples: int = 0,
        metrics: Mapping[str, float] | None = None,
        evaluation: Evaluation | None = None,
        encoding_error: float | None = None,
        rows: list[object] | None = None,
        base_digest: str | None = None,
    ) -> Update:
        update_id = update_id_of(assignment.assignment_id)
        measured = Evaluation(0, {}) if evaluation is None else evaluation
        fields = {
            "federation": self._federation,
            "update_id": update_id,
            "assignment_id": assignment.assignment_id,
            "job_id": assignment.job_id,
            "version": assignment.version,
            "kind": assignment.kind,
            "layout_digest": layout.digest,
            "basis_digest": assignment.basis_digest or None,
            "base_revision": assignment.base_revision or None,
            "base_digest": base_digest,
            "frame_bytes": len(frame),
            "frame_digest": frame.sha256(),
            "num_examples": num_examples,
            "metrics": _finite(metrics or {}),
            "evaluated_examples": measured.num_examples,
            "evaluation": _finite(measured.metrics),
            "encoding_error": encoding_error,
            "layout": rows,
        }
        try:
            header = UpdateHeader.model_validate(fields).to_bytes()
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise Declined(f"the update cannot be described: {path}: {first['msg']}") from error
        return Update(update_id, header, sign(self._signing_key, SIGNATURE_CONTEXT, header), frame)


def update_id_of(assignment_id: str) -> str:
    """Return the id of an assignment's update: one and the same for every try, also after a crash."""
    return hashlib.sha256(f"update:{assignment_id}".encode()).hexdigest()[:32]


def _check_base(assignment: Assignment, own: str | None) -> None:
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


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that can be sent; the update is worth more than a figure that is not a number."""
    numbers = {name: float(value) for name, value in metrics.items()}
    left_out = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    if left_out:
        _log.warning("metrics left out: not finite", extra={"metrics": left_out})
    return {name: value for name, value in numbers.items() if name not in left_out}
