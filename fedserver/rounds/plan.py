"""A job's plugins, built once: everything about a job file that only the server can check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fedagg import build_optimizer, build_rule
from fedagg.base import Capacity, Fold, Rule
from fedagg.optimizers.base import ServerOptimizer
from fedcodec import Pipeline, build_pipeline
from fedcodec.presets import expand
from fedcore.errors import InvalidInput, JobFileError, UnknownPlugin
from fedcore.jobfile import CodecStage, Job
from fedcore.layout import Layout
from fedcore.messages import UpdateHeader, WorkKind
from fedserver.rounds.fitness import misfits_of
from fedserver.rounds.start import GradientStart, gradient_start

INITIAL: Final = build_pipeline([{"codec": "raw"}])
"""How version 0 comes from the client that builds it: exactly, whatever the job does to its updates."""


@dataclass(frozen=True)
class Plan:
    """A job with its pipelines, rule and optimiser; `start` for one that starts from its clients' gradients."""

    job: Job
    uplink: Pipeline
    downlink: Pipeline
    rule: Rule
    optimizer: ServerOptimizer
    start: GradientStart | None = None
    _bounds: dict[WorkKind, tuple[str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By kind, the layout's digest and the bound."""

    @property
    def codecs(self) -> frozenset[str]:
        """Names of the codecs that a client must have."""
        stages = (*self.job.compression.uplink, *self.job.compression.downlink)
        first = () if self.start is None else (str(self.start.params.gradient_codec["codec"]),)
        return frozenset((*(stage.codec for stage in stages), *first))

    def open_fold(self, num_values: int) -> Fold:
        """Return an empty fold for one version.

        Every client that is assigned may send one update, so the sum's capacity is theirs.
        """
        schedule, aggregator = self.job.schedule, self.job.aggregator
        capacity = Capacity(
            max_updates=schedule.clients_to_assign,
            max_weight=aggregator.max_examples,
            max_abs=aggregator.max_abs,
        )
        return self.rule.open(num_values, capacity)

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
        if self._bounds.get(kind, ("", 0))[0] != layout.digest:
            self._bounds[kind] = (layout.digest, pipeline.max_frame_bytes(layout.sizes))
        return self._bounds[kind][1]

    def weight_of(self, header: UpdateHeader) -> int:
        """Return an update's weight: its sample count, which the client declares itself and the job therefore caps."""
        return min(header.num_examples, self.job.aggregator.max_examples)


def make_plan(job: Job, source: str) -> Plan:
    """Build a job's plugins. The plan's job has its presets written out.

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
    if misfits := misfits_of(job, uplink, downlink):
        raise JobFileError(source, misfits)
    try:
        plan = Plan(job, uplink, downlink, rule, optimizer, gradient_start(job))
    except InvalidInput as error:
        raise JobFileError(source, [str(error)]) from error
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
