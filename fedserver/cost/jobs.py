"""What a job file says that costs depend on."""

from __future__ import annotations

from dataclasses import dataclass

from fedcodec import Pipeline
from fedcore.adapters import LORA_PARAMS, FullParams, LowRankParams
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.methods import METHODS, Method, method_of
from fedcore.params import parse_params
from fedserver.rounds.plan import make_plan


@dataclass(frozen=True)
class JobCosts:
    """A job as costs see it.

    Attributes:
        name: the job's.
        method: what it runs.
        rank: None if its adapter has none.
        targets: patterns of the layers that are adapted; empty if its adapter has none.
        trainable: patterns of the parameters that are trained whole.
        clients: its cohort.
        model: what its task calls the model; empty if it does not say.
        pipelines: up and down.
        lower_ranks: whether some clients have a lower rank.
    """

    name: str
    method: Method
    rank: int | None
    targets: tuple[str, ...]
    trainable: tuple[str, ...]
    clients: int
    model: str
    pipelines: tuple[Pipeline, Pipeline]
    lower_ranks: bool


def costs_of_job(job: Job, source: str) -> JobCosts:
    """Return what a job says.

    Raises:
        InvalidInput: the job cannot be run, or what its adapter sends is not known.
    """
    plan = make_plan(job, source)
    job, method = plan.job, method_of(plan.job)
    if method is None:
        known = ", ".join(f"{each.adapter} with {each.rule}" for each in METHODS.values())
        raise InvalidInput(
            f"adapter {job.adapter.name!r} with rule {job.aggregator.rule!r}: costs are known of {known}"
        )
    model = job.task.params.get("model")
    params: FullParams | LowRankParams = (
        parse_params(FullParams, job.adapter.params, "adapter")
        if method.whole
        else parse_params(LORA_PARAMS[job.adapter.name], job.adapter.params, "adapter")
    )
    return JobCosts(
        name=job.job.name,
        method=method,
        rank=None if isinstance(params, FullParams) else params.rank,
        targets=() if isinstance(params, FullParams) else tuple(params.targets),
        trainable=tuple(params.trainable),
        clients=job.schedule.cohort,
        model=model if isinstance(model, str) else "",
        pipelines=(plan.uplink, plan.downlink),
        lower_ranks=bool(plan.sending.ranks),
    )
