"""Whether a private job can be hidden, summed up and counted by this server."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from fedagg import Rule
from fedagg.weighted_mean import WeightedMean
from fedcodec import Pipeline
from fedcore.adapters import ALTERNATING
from fedcore.errors import InvalidInput
from fedcore.privacy import DpFedAvg, DpSgd, RqmPrivacy
from fedprivacy.accountant import ACCOUNTING_MISSING, guarantee, is_installed
from fedprivacy.events import Trust
from fedprivacy.jobs import Accounting
from fedprivacy.order import disorder_of


def private_misfits_of(accounting: Accounting, uplink: Pipeline, rule: Rule) -> list[str]:
    """Return a sentence for each part of a job that its privacy does not allow."""
    if not is_installed():
        return [f"privacy: {ACCOUNTING_MISSING}"]
    disorder = disorder_of(accounting, uplink.stages)
    return [*disorder, *_rule(accounting, rule), *_turns(accounting), *_room(accounting), *_delta(accounting)]


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


def _rule(accounting: Accounting, rule: Rule) -> Iterator[str]:
    if accounting.trust is not Trust.LOCAL and (not isinstance(rule, WeightedMean) or rule.over != "all"):
        yield (
            f"aggregator: {accounting.section.mechanism} bounds what one client moves a mean by, and {rule.name} with"
            f" {rule.params()} is none over all clients: use weighted-mean over 'all', or mechanism dp-sgd"
        )


def _turns(accounting: Accounting) -> Iterator[str]:
    job, section = accounting.job, accounting.section
    if job.adapter.name in ALTERNATING and isinstance(section, DpFedAvg) and section.noise == "server":
        yield f"privacy.noise: {job.adapter.name} keeps one factor as it is, and noise by the server would move it too"


def _room(accounting: Accounting) -> Iterator[str]:
    section, schedule = accounting.section, accounting.job.schedule
    if not isinstance(section, DpFedAvg) or section.noise_multiplier is None:
        return
    shares = schedule.updates_at_deadline if section.noise == "clients" else 1
    noise = 0.0 if section.noise == "server" else section.noise_multiplier / shares**0.5
    largest = section.clip * (1 + 6 * noise)
    if largest > accounting.job.aggregator.max_abs:
        yield (
            f"aggregator.max_abs: {accounting.job.aggregator.max_abs:g}, and values of updates up to {largest:g} are"
            " usual: one with a larger value is refused"
        )


def _delta(accounting: Accounting) -> Iterator[str]:
    cohort, section = accounting.job.schedule.cohort, accounting.section
    if not isinstance(section, DpSgd) and section.delta * cohort >= 1:
        yield f"privacy.delta: {section.delta:g}, and below 1 / clients = {1 / cohort:g} is needed"
