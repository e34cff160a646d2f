"""From an assignment to a signed update: everything that computes, and nothing that waits.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedclient.declining import Declined, declining
from fedclient.frozen import Frozen
from fedclient.guard import Guard
from fedclient.hiding import draws_of, hidden
from fedclient.pieces import Pieces
from fedclient.plans import JobPlan, Plans, check_base
from fedclient.residuals import Residuals, corrected, encoding_error
from fedclient.trainer import Evaluation, Work
from fedclient.worker import Worker
from fedcodec import Pipeline, build_pipeline
from fedcore.adapters import LoraSbParams, gradient_layout
from fedcore.draws import Draws, PrivateDraws
from fedcore.identity import sign
from fedcore.jobfile import Job
from fedcore.layout import Layout, Vector
from fedcore.messages import SIGNATURE_CONTEXT, Assignment, UpdateHeader, WorkKind
from fedcore.params import parse_params
from fedcore.rng import stream

RAW: Final = build_pipeline([{"codec": "raw"}])
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What is sent; `header` is the very bytes that were signed."""

    update_id: str
    header: bytes
    signature: bytes
    frame: Pieces


class Encoded(NamedTuple):
    """An encoded difference; `error` as in `UpdateHeader.encoding_error`."""

    frame: Pieces
    error: float | None


class UpdateMaker:
    """Turns assignments into updates. Synchronous; every method is called on the worker thread.

    The same assignment, version and data give the same bytes, so an update that is made twice counts once. But those of
    private jobs are drawn anew each time.

    Args:
        worker: trains and evaluates.
        signing_key: signs headers, and is what draws that hide something follow from.
        federation: the server that updates are for.
        client: this client's name.
        residuals: keeps what encoding leaves out, for jobs with error feedback.
        guard: refuses work, and notes what is released.

    Attributes:
        frozen: what has to be here before `update`.
    """

    def __init__(
        self,
        worker: Worker,
        signing_key: Ed25519PrivateKey,
        federation: str,
        client: str,
        residuals: Residuals,
        guard: Guard,
    ) -> None:
        self._worker = worker
        self._guard = guard
        self._residuals = residuals
        self._signing_key = signing_key
        self._federation = federation
        self._client = client
        self._plans = Plans(worker, client, guard)
        self.frozen = Frozen(worker, self._plans)

    def initialise(self, assignment: Assignment) -> Update:
        """Return version 0 as a raw frame, with its layout.

        Raises:
            Declined: the job is not valid, names what is not installed here, asks for another base model, or its code
                failed; or the policy refuses it.
        """
        with declining(assignment):
            job = Job.from_json(assignment.job)
            self._guard.check(assignment, job)
            work = self._plans.work(assignment, job)
            layout, values_D = self._worker.initialise(work)
            base_digest = self._worker.base_digest(work)
            check_base(assignment, base_digest)
            frame = Pieces(*RAW.parts(values_D, stream(assignment.seed, "encode")))
            return self._sign(assignment, layout, frame, rows=json.loads(layout.to_json()), base_digest=base_digest)

    def max_frame_bytes(self, assignment: Assignment) -> int:
        """Check all that can be checked before a download, and return what the frame can have at most.

        Raises:
            Declined: as for `initialise`, or this client computes another layout than the server has.
            StorageFailed: the privacy ledger cannot be opened.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            return plan.downlink.max_frame_bytes(plan.layout.moving.sizes)

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
            StorageFailed: what encoding left out cannot be kept, and would be lost; or the update cannot be noted in
                the privacy ledger.
        """
        with declining(assignment):
            plan = self._plans.of(assignment)
            work = self._plans.work(assignment, plan.job)
            self.frozen.check(assignment)
            base_D = plan.downlink.decode(frame, plan.layout.moving.sizes)
            if assignment.kind is WorkKind.EVALUATE:
                return self._sign(assignment, plan.layout, Pieces(), evaluation=self._measured(plan, work, base_D))
            draws = draws_of(plan.job, assignment, self._client)
            if assignment.kind is WorkKind.GRADIENT:
                return self._gradient(assignment, plan, work, base_D, draws, stop)
            trained = self._worker.train(work, base_D, draws=draws, progress=progress, stop=stop)
            update = hidden(plan.job, assignment, trained.delta_D, draws)
            encoded = self._encode(assignment, plan, update.delta_D, draws)
            self._guard.charge(assignment, plan.job, self._plans.dimension(assignment, plan))
            return self._sign(
                assignment,
                plan.layout,
                encoded.frame,
                encoding_error=encoded.error if draws is None else None,
                num_examples=_told(plan.job, trained.num_examples),
                metrics=trained.metrics,
                evaluation=trained.evaluation,
                within_clip=update.within_clip,
                drawn=draws is not None,
            )

    def _measured(self, plan: JobPlan, work: Work, base_D: Vector) -> Evaluation | None:
        """Measure, unless that is nobody's business."""
        privacy = plan.job.privacy
        return self._worker.evaluate(work, base_D) if privacy is None or privacy.evaluation else None

    def _gradient(
        self,
        assignment: Assignment,
        plan: JobPlan,
        work: Work,
        base_D: Vector,
        draws: PrivateDraws | None,
        stop: threading.Event,
    ) -> Update:
        """Return the sum of the loss's gradients by the adapted weights, or its signs."""
        params = parse_params(LoraSbParams, plan.job.adapter.params, "adapter")
        found = self._worker.gradient(work, base_D, params.samples, draws=draws, stop=stop)
        rng = stream(assignment.seed, "encode")
        if params.votes:
            # One bit has no zero. A weight without a gradient, such as that of an input that is always 0, must not
            # get everybody's same vote: votes that are drawn cancel out.
            undecided = np.flatnonzero(found.values == 0)
            found.values[undecided] = rng.choice(np.array([-1, 1], dtype=np.float32), undecided.size)
        sizes = gradient_layout(plan.layout).sizes
        frame = Pieces(*build_pipeline([params.gradient_codec]).parts(found.values, rng, sizes))
        told = _told(plan.job, found.num_examples)
        measured = self._measured(plan, work, base_D)
        self._guard.charge(assignment, plan.job, self._plans.dimension(assignment, plan))
        is_drawn = draws is not None
        return self._sign(assignment, plan.layout, frame, num_examples=told, evaluation=measured, drawn=is_drawn)

    def _encode(self, assignment: Assignment, plan: JobPlan, delta_D: Vector, draws: PrivateDraws | None) -> Encoded:
        """Encode what training gave, and for a job with error feedback keep what that leaves out."""
        uplink, feedback = plan.uplink, plan.job.compression.error_feedback
        sizes = plan.sending.layout(plan.layout, self._client, assignment.version).sizes
        rng = self._draws(assignment, uplink, delta_D) if draws is None else draws
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
        within_clip: int | None = None,
        rows: list[object] | None = None,
        base_digest: str | None = None,
        drawn: bool = False,
    ) -> Update:
        digest = frame.sha256()
        update_id = update_id_of(assignment.assignment_id, digest if drawn else "")
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
            "frame_digest": digest,
            "num_examples": num_examples,
            "metrics": _finite(metrics or {}),
            "evaluated_examples": measured.num_examples,
            "evaluation": _finite(measured.metrics),
            "encoding_error": encoding_error,
            "within_clip": within_clip,
            "layout": rows,
        }
        try:
            header = UpdateHeader.model_validate(fields).to_bytes()
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise Declined(f"the update cannot be described: {path}: {first['msg']}") from error
        return Update(update_id, header, sign(self._signing_key, SIGNATURE_CONTEXT, header), frame)


def update_id_of(assignment_id: str, drawn: str = "") -> str:
    """Return the id of an assignment's update: one and the same for every try, also after a crash.

    A private one is drawn anew then, and is another one: `drawn` is its digest.
    """
    return hashlib.sha256(f"update:{assignment_id}{drawn}".encode()).hexdigest()[:32]


def _told(job: Job, num_examples: int) -> int:
    """Return how many examples a client says it has: of a private job no more than counts."""
    return num_examples if job.privacy is None else min(num_examples, job.aggregator.max_examples)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that can be sent; the update is worth more than a figure that is not a number."""
    numbers = {name: float(value) for name, value in metrics.items()}
    left_out = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    if left_out:
        _log.warning("metrics left out: not finite", extra={"metrics": left_out})
    return {name: value for name, value in numbers.items() if name not in left_out}
