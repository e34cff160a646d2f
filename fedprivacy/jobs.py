"""What a private job releases: its `[privacy]` section as events.

Shape legend: D values in an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.params import parse_params
from fedcore.privacy import DpFedAvg, DpLoraPaper, DpSgd, PrivacySection, RqmPrivacy, steps_per_round
from fedprivacy.events import (
    Adjacency,
    ClipCount,
    Everyone,
    FixedSize,
    Gaussian,
    History,
    Mechanism,
    Release,
    Rqm,
    Sampling,
    Trust,
    Unit,
)
from fedprivacy.planning import noise_multiplier_for, sampling_of

COUNT_STD_SHARE: Final = 1 / 20
"""Of the cohort: noise on how many updates are below the clip (Andrew et al., 2021)."""

EVERYBODY: Final = "*"
"""In a ledger: each client there is, in the round or not. No client has this name."""


@dataclass(frozen=True)
class Round:
    """Who took part in one round.

    Attributes:
        clients: whose updates are in the version.
        assigned: how many were asked.
        available: how many could have been asked; these and no others were drawn from.
    """

    clients: int
    assigned: int
    available: int


@dataclass(frozen=True)
class Accounting:
    """How a private job is accounted for; `section` is the job's."""

    job: Job
    section: PrivacySection

    @staticmethod
    def of(job: Job) -> Accounting | None:
        """Return how a job is accounted for; None: it is not private."""
        return None if job.privacy is None else Accounting(job, job.privacy)

    @property
    def is_local(self) -> bool:
        """Whether clients hide from the server what they hide, so that each update is a release."""
        return self.trust is Trust.LOCAL

    @property
    def unit(self) -> Unit:
        """Of the guarantee."""
        return Unit.EXAMPLE if isinstance(self.section, DpSgd) else Unit.CLIENT

    @property
    def adjacency(self) -> Adjacency:
        """Of the guarantee. Who takes part, and with how many examples, is taken to be known."""
        replaces = isinstance(self.section, RqmPrivacy) or self.is_secret
        return Adjacency.REPLACE if replaces else Adjacency.ZERO_OUT

    @property
    def trust(self) -> Trust:
        """Of the guarantee."""
        match self.section:
            case DpSgd() | DpLoraPaper():
                return Trust.LOCAL
            case RqmPrivacy(trust=trust):
                return Trust.LOCAL if trust == "local" else Trust.CENTRAL
            case DpFedAvg(noise=noise):
                return {"server": Trust.CENTRAL, "clients": Trust.DISTRIBUTED, "local": Trust.LOCAL}[noise]

    @property
    def is_secret(self) -> bool:
        """Whether cohorts are drawn in secret."""
        return isinstance(self.section, DpFedAvg) and self.section.secret_cohort

    def charged(self, clients: Iterable[str]) -> tuple[str, ...]:
        """Return who is charged for a round with these clients: all there are, where nobody knows who was drawn."""
        return (EVERYBODY,) if self.is_secret else tuple(sorted(set(clients)))

    def history(self, *releases: Release) -> History:
        """Return what some releases are as a whole."""
        history = History(unit=self.unit, adjacency=self.adjacency, trust=self.trust)
        for release in releases:
            history = history.then(release)
        return history

    def trained(self, who: Round, dimension: int) -> Release:
        """Return what each client has let out whose update of D = `dimension` values is in a version.

        Raises:
            ValidationError: what was released is beyond what can be accounted for.
        """
        match section := self.section:
            case DpSgd():
                steps = steps_per_round(section, self.job.training.local_epochs)
                return Release(
                    mechanisms=(Gaussian(noise_multiplier=section.multiplier),),
                    sampling=sampling_of(section.sampling),
                    count=steps,
                )
            case RqmPrivacy():
                clients = 1 if self.is_local else who.clients
                return Release(mechanisms=(self._levels(clients, dimension),))
            case DpLoraPaper():
                return Release(mechanisms=(Gaussian(noise_multiplier=section.multiplier),))
            case DpFedAvg():
                return Release(mechanisms=self._summed(section, section.multiplier, who), sampling=self._drawn(who))

    def started(self, who: Round) -> Release:
        """Return what each client has let out whose gradients the job's start is made of."""
        section = self.section
        assert section.start is not None
        multiplier = section.start.noise_multiplier
        if isinstance(section, DpSgd):
            once = (Gaussian(noise_multiplier=multiplier),)
            return Release(mechanisms=once, sampling=sampling_of(section.sampling))
        if isinstance(section, DpFedAvg):
            fixed = section.model_copy(update={"adaptive": None})
            return Release(mechanisms=self._summed(fixed, multiplier, who), sampling=self._drawn(who))
        return Release(mechanisms=(Gaussian(noise_multiplier=multiplier),))

    def planned(self, dimension: int, rounds: int, population: int = 0, *, with_start: bool = True) -> History:
        """Return what a client lets out that is in every version, with as few others as a quorum.

        Args:
            dimension: values in an update.
            rounds: how many versions after version 0.
            population: clients that secret cohorts are drawn from; fewer than are asked: drawing gains nothing.
            with_start: whether the first of these rounds is the job's start, if it has one.
        """
        schedule, left = self.job.schedule, rounds
        who = Round(schedule.updates_at_deadline, schedule.clients_to_assign, population)
        history = self.history()
        if with_start and self.section.start is not None and left:
            history, left = history.then(self.started(who)), left - 1
        if not left:
            return history
        once = self.trained(who, dimension)
        return history.then(once.model_copy(update={"count": left * once.count}))

    def _summed(self, section: DpFedAvg, multiplier: float, who: Round) -> tuple[Mechanism, ...]:
        if section.noise == "clients":
            shares = self.job.schedule.updates_at_deadline
            return (Gaussian(noise_multiplier=multiplier * math.sqrt(max(1.0, who.clients / shares))),)
        std = count_std(section, self.job.schedule.cohort)
        if std is None:
            return (Gaussian(noise_multiplier=multiplier),)
        return Gaussian(noise_multiplier=update_multiplier(multiplier, std)), ClipCount(std=std)

    def _drawn(self, who: Round) -> Sampling:
        if not self.is_secret or who.available <= who.assigned:
            return Everyone()
        return FixedSize(size=who.assigned, population=who.available)

    def _levels(self, clients: int, dimension: int) -> Rqm:
        stages = {stage.codec: stage.params for stage in self.job.compression.uplink}
        clip = stages.get("clip")
        levels = {**stages["rqm"], "clients": clients, "dimension": dimension}
        return parse_params(Rqm, levels if clip is None else {**levels, "l2_clip": clip.get("norm", 1.0)}, "rqm")


def count_std(section: DpFedAvg, cohort: int) -> float | None:
    """Return the noise on how many updates are below the clip; None: the clip stays as it is."""
    if section.adaptive is None:
        return None
    return section.adaptive.count_std or cohort * COUNT_STD_SHARE


def update_multiplier(multiplier: float, std: float) -> float:
    """Return the noise multiplier of a sum which, with a count noised by `std`, costs what `multiplier` does.

    Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, 2021, theorem 1.

    Raises:
        InvalidInput: the count alone costs more.
    """
    left = multiplier**-2 - (2 * std) ** -2
    if left <= 0:
        raise InvalidInput(
            f"privacy.adaptive: a count noised by {std:g} alone costs what noise multiplier {2 * std:g} does, and"
            f" {multiplier:g} is asked for: a larger cohort, a larger count_std or a smaller multiplier is needed"
        )
    return float(left**-0.5)


def with_noise(job: Job) -> Job:
    """Return a job whose noise multiplier is written out: what lets a client be in every round within epsilon.

    Raises:
        InvalidInput: no multiplier does.
        ConfigError: dp-accounting is not installed.
    """
    section = job.privacy
    if section is None or isinstance(section, RqmPrivacy) or section.noise_multiplier is not None:
        return job
    assert section.epsilon is not None

    def with_multiplier(multiplier: float) -> Job:
        return job.model_copy(update={"privacy": section.model_copy(update={"noise_multiplier": multiplier})})

    def history(multiplier: float) -> History:
        tried = with_multiplier(multiplier)
        # A clip that follows the norms costs nothing beside: its count takes a share of the noise.
        fixed = {} if not isinstance(tried.privacy, DpFedAvg) else {"adaptive": None}
        assert tried.privacy is not None
        return Accounting(tried, tried.privacy.model_copy(update=fixed)).planned(1, job.job.rounds)

    return with_multiplier(noise_multiplier_for(section.epsilon, section.delta, history))
