"""Whether a private job hides what it says: the order of clipping, noise and compression, and weights."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from fedagg import Rule
from fedagg.weighted_mean import WeightedMean
from fedcodec import Pipeline
from fedcore.adapters import GRADIENT_START, LoraSbParams
from fedcore.errors import InvalidInput
from fedcore.params import parse_params
from fedcore.privacy import DpFedAvg, DpLoraPaper, DpSgd, RqmPrivacy
from fedprivacy.accountant import ACCOUNTING_MISSING, guarantee, is_installed
from fedprivacy.events import Trust
from fedprivacy.jobs import Accounting

_RQM_KINDS = ("clip", "split", "quantise", "symbols", "compress")
"""Stages that may stand beside `rqm`: others would choose or scale values before they are hidden."""


def private_misfits_of(accounting: Accounting, uplink: Pipeline, rule: Rule) -> list[str]:
    """Return a sentence for each part of a job that its privacy does not allow."""
    if not is_installed():
        return [f"privacy: {ACCOUNTING_MISSING}"]
    return [
        *_weights(accounting),
        *_feedback(accounting),
        *_order(accounting, uplink),
        *_sum(accounting, uplink, rule),
        *_start(accounting),
        *_training(accounting),
        *_delta(accounting),
    ]


def _weights(accounting: Accounting) -> Iterator[str]:
    weight = accounting.job.aggregator.max_examples
    if not isinstance(accounting.section, DpSgd) and weight != 1:
        yield (
            f"aggregator.max_examples: {weight}, and {accounting.section.mechanism} bounds what one client adds to a"
            " sum in which all weigh the same: set it to 1"
        )


def _feedback(accounting: Accounting) -> Iterator[str]:
    is_whole = isinstance(accounting.section, DpFedAvg | RqmPrivacy)
    if is_whole and accounting.job.compression.error_feedback is not None:
        name = accounting.section.mechanism
        yield f"compression.error_feedback: what {name} leaves out of one update would come with the next one, unhidden"


def _order(accounting: Accounting, uplink: Pipeline) -> Iterator[str]:
    name = accounting.section.mechanism
    names = [stage.name for stage in uplink.stages]
    if isinstance(accounting.section, RqmPrivacy):
        if "rqm" not in names:
            yield f"compression.uplink: mechanism rqm is the codec 'rqm', and there is {', '.join(names)}"
        for stage in uplink.stages:
            if stage.kind not in _RQM_KINDS or stage.name == "gaussian-noise":
                yield f"compression.uplink: {stage.name} before rqm changes how far two updates are apart"
        return
    for own in ("clip", "gaussian-noise"):
        if own in names:
            yield f"compression.uplink: {name} clips and adds noise by itself, before all codecs: leave {own} out"


def _sum(accounting: Accounting, uplink: Pipeline, rule: Rule) -> Iterator[str]:
    """What has to hold where it is the sum that hides."""
    job, section = accounting.job, accounting.section
    if accounting.trust is Trust.LOCAL:
        if isinstance(section, DpFedAvg) and section.noise_multiplier is not None:
            yield from _room(accounting, section.clip * (1 + 6 * section.noise_multiplier))
        return
    if not isinstance(rule, WeightedMean) or rule.over != "all":
        yield (
            f"aggregator: {section.mechanism} bounds what one client moves a mean by, and {rule.name} with"
            f" {rule.params()} is none over all clients: use weighted-mean over 'all', or mechanism dp-sgd"
        )
    if isinstance(section, DpFedAvg) and section.noise == "clients":
        if not uplink.traits.lossless:
            changed = ", ".join(stage.name for stage in uplink.stages if not stage.traits.lossless)
            yield f"compression.uplink: shares of noise add up as long as nothing changes them, and {changed} does"
        if section.noise_multiplier is not None:
            shares = job.schedule.updates_at_deadline
            yield from _room(accounting, section.clip * (1 + 6 * section.noise_multiplier / shares**0.5))
    elif isinstance(section, DpFedAvg):
        for stage in uplink.stages:
            if stage.traits.changes_sensitivity:
                yield (
                    f"compression.uplink: {stage.name} can make a clipped update longer, and noise is added after it:"
                    " use lossless codecs or selectors, or noise = 'local'"
                )


def _room(accounting: Accounting, largest: float) -> Iterator[str]:
    if largest > accounting.job.aggregator.max_abs:
        yield (
            f"aggregator.max_abs: {accounting.job.aggregator.max_abs:g}, and with noise values up to {largest:g} are"
            " usual: an update with one above it is refused"
        )


def _start(accounting: Accounting) -> Iterator[str]:
    job, section = accounting.job, accounting.section
    if job.adapter.name not in GRADIENT_START:
        if section.start is not None:
            yield f"privacy.start: adapter {job.adapter.name} does not start from gradients: leave it out"
        return
    if section.start is None:
        yield f"privacy.start: {job.adapter.name} starts from gradients of the data: give clip and noise_multiplier"
    params = parse_params(LoraSbParams, job.adapter.params, "adapter")
    if params.votes and not accounting.is_local:
        yield "adapter.votes: signs of gradients are not bounded by privacy.start.clip: leave it out"


def _training(accounting: Accounting) -> Iterator[str]:
    training, section = accounting.job.training, accounting.section
    if isinstance(section, DpSgd | DpLoraPaper) and training.max_grad_norm is not None:
        yield f"training.max_grad_norm: {section.mechanism} clips by privacy.clip: leave it out"


def _delta(accounting: Accounting) -> Iterator[str]:
    cohort, section = accounting.job.schedule.cohort, accounting.section
    if not isinstance(section, DpSgd) and section.delta * cohort >= 1:
        yield f"privacy.delta: {section.delta:g}, and below 1 / clients = {1 / cohort:g} is needed"


def check_countable(accounting: Accounting) -> None:
    """Check that a job's releases can be accounted for: bounds of events are narrower than those of codecs.

    Raises:
        InvalidInput: they cannot, or its budget does not allow the first round that trains.
    """
    section, rounds = accounting.section, 1 if accounting.section.start is None else 2
    try:
        first = accounting.planned(1, rounds)
    except ValidationError as error:
        raise InvalidInput(f"privacy: {error.errors()[0]['msg']}") from error
    if section.epsilon is None or isinstance(section, RqmPrivacy) or accounting.is_secret:
        return  # what a round costs depends on the layout, and on who there is to draw from
    if (least := guarantee(first, section.delta).epsilon) > section.epsilon:
        text = f"{rounds} rounds bring" if rounds > 1 else "one round brings"
        raise InvalidInput(f"privacy.epsilon: {text} it to {least:.4g}, above the budget of {section.epsilon:g}")
