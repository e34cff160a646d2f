"""A job's plugins, built once: everything about a job file that only the server can check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fedagg import build_optimizer, build_rule
from fedagg.base import Capacity, FactorRule, Fold, FoldRule, Rule
from fedagg.optimizers.base import ServerOptimizer
from fedcodec import Pipeline, build_pipeline
from fedcodec.presets import expand
from fedcore.errors import InvalidInput, JobFileError, UnknownPlugin
from fedcore.jobfile import CodecStage, Job
from fedcore.layout import Layout
from fedcore.messages import UpdateHeader, WorkKind
from fedcore.part import Part
from fedcore.sending import Sending, spread
from fedprivacy.jobs import Accounting, with_noise
from fedserver.rounds.fitness import misfits_of
from fedserver.rounds.private_fitness import check_countable, private_misfits_of
from fedserver.rounds.start import GradientStart, gradient_start

INITIAL: Final = build_pipeline([{"codec": "raw"}])
"""How version 0 comes from the client that builds it: exactly, whatever the job does to its updates."""

MAX_BOUNDS: Final = 64
"""Bounds of frames that are kept: more than a job has kinds of work, ranks and turns."""


@dataclass(frozen=True)
class Plan:
    """A job with its pipelines, rule and optimiser, what its clients send of the state, and how it starts.

    `start` is None for a job that does not start from its clients' gradients, `accounting` for one that is not private.
    """

    job: Job
    uplink: Pipeline
    downlink: Pipeline
    rule: Rule
    optimizer: ServerOptimizer
    sending: Sending
    start: GradientStart | None = None
    accounting: Accounting | None = None
    _bounds: dict[tuple[WorkKind, str], int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By kind and layout's digest."""

    @property
    def codecs(self) -> frozenset[str]:
        """Names of the codecs that a client must have."""
        stages = (*self.job.compression.uplink, *self.job.compression.downlink)
        first = () if self.start is None else (str(self.start.params.gradient_codec["codec"]),)
        return frozenset((*(stage.codec for stage in stages), *first))

    @property
    def changes_base(self) -> bool:
        """Whether versions change the frozen matrices."""
        return isinstance(self.rule, FactorRule) and self.rule.changes_base

    def open_fold(self, num_values: int) -> Fold | None:
        """Return an empty fold for one version; None: the rule reads all updates when they are there.

        Every client that is assigned may send one update, so the sum's capacity is theirs.
        """
        schedule, aggregator = self.job.schedule, self.job.aggregator
        capacity = Capacity(
            max_updates=schedule.clients_to_assign,
            max_weight=aggregator.max_examples,
            max_abs=aggregator.max_abs,
        )
        return self.rule.open(num_values, capacity) if isinstance(self.rule, FoldRule) else None

    def pipeline_of(self, kind: WorkKind) -> Pipeline | None:
        """Return how the frames of this kind of work are encoded; None: there is no frame."""
        match kind:
            case WorkKind.INITIALISE:
                return INITIAL
            case WorkKind.GRADIENT:
                return None if self.start is None else self.start.uplink
            case WorkKind.TRAIN:
                return self.uplink
            case WorkKind.EVALUATE:
                return None

    def max_frame_bytes(self, kind: WorkKind, layout: Layout) -> int:
        """Return a bound on the frames of this kind of work.

        Of many tensors that takes long, so it is computed once as long as the layout stays the same. Called on the
        event loop's thread alone.
        """
        pipeline = self.pipeline_of(kind)
        if pipeline is None:
            return 0
        key = kind, layout.digest
        if key not in self._bounds:
            self._bounds[key] = pipeline.max_frame_bytes(layout.sizes)
            while len(self._bounds) > MAX_BOUNDS:  # clients that send layouts could make it grow
                del self._bounds[next(iter(self._bounds))]
        return self._bounds[key]

    def trained(self, kind: WorkKind, layout: Layout | None, client: str, version: int) -> Layout | None:
        """Return the layout of what a client sends that has trained from `version`; None for any other work."""
        return None if layout is None or kind is not WorkKind.TRAIN else self.sending.layout(layout, client, version)

    def parts(self, frame: memoryview, layout: Layout, client: str, version: int) -> Iterable[Part]:
        """Return what `client` has sent, trained from `version`, as parts of all that moves in the job's `layout`.

        Raises:
            FrameError: while it is read, the frame is malformed.
        """
        sent = self.sending.layout(layout, client, version)
        return spread(self.uplink.open(frame, sent.sizes), sent, layout.moving)

    def weight_of(self, header: UpdateHeader) -> int:
        """Return an update's weight: its sample count, which the client declares itself and the job therefore caps."""
        return min(header.num_examples, self.job.aggregator.max_examples)


def make_plan(job: Job, source: str) -> Plan:
    """Build a job's plugins. The plan's job has its presets written out, and the noise that its epsilon allows.

    Finding that takes seconds.

    Raises:
        JobFileError: a plugin is unknown, its parameters are wrong, or the parts do not fit; every problem at once.
    """
    try:
        job = job.model_copy(update={"compression": expand(job.compression)})
    except UnknownPlugin as error:
        raise JobFileError(source, [f"compression.preset: {error}"]) from error
    problems: list[str] = []
    uplink = _pipeline("compression.uplink", job.compression.uplink, problems)
    downlink = _pipeline("compression.downlink", job.compression.downlink, problems)
    rule = optimizer = None
    try:
        rule = build_rule(job.aggregator.rule, job.aggregator.params)
    except InvalidInput as error:
        problems.append(f"aggregator: {error}")
    try:
        optimizer = build_optimizer(job.server_optimizer.name, job.server_optimizer.params)
    except InvalidInput as error:
        problems.append(f"server_optimizer: {error}")
    if problems or uplink is None or downlink is None or rule is None or optimizer is None:
        raise JobFileError(source, problems)
    try:
        sending, start = Sending.of(job.adapter), gradient_start(job)
    except InvalidInput as error:
        raise JobFileError(source, [str(error)]) from error
    misfits = misfits_of(job, uplink, downlink, rule, sending)
    if (accounting := Accounting.of(job)) is not None:
        misfits += private_misfits_of(accounting, uplink, rule)
    if misfits:
        raise JobFileError(source, misfits)
    try:
        if (accounting := Accounting.of(job := with_noise(job))) is not None:
            check_countable(accounting)
    except InvalidInput as error:
        raise JobFileError(source, [str(error)]) from error
    plan = Plan(job, uplink, downlink, rule, optimizer, sending, start, accounting)
    try:
        plan.open_fold(1)
    except InvalidInput as error:
        raise JobFileError(source, [f"aggregator: {error}"]) from error
    return plan


def _pipeline(where: str, stages: list[CodecStage], problems: list[str]) -> Pipeline | None:
    try:
        return build_pipeline([{"codec": stage.codec, **stage.params} for stage in stages])
    except InvalidInput as error:
        problems.append(f"{where}: {error}")
        return None
