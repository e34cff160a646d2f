"""What a client has released, by job and in all."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Final, Literal

from pydantic import Field

from fedcore.jobfile import Name
from fedcore.messages import Count, ShortId
from fedcore.params import Params
from fedprivacy.events import Adjacency, ClipCount, Gaussian, History, Mechanism, Release, Rqm, Trust, Unit

_FROM_BEST: Final = (Trust.LOCAL, Trust.SECURE_SUM, Trust.DISTRIBUTED, Trust.CENTRAL)


class Entry(Params):
    """One update, as the ledger keeps it.

    Attributes:
        version: that it was computed from.
        released: the one release, and between which neighbours it is measured; None: nothing hides the update.
        wall_s: when, seconds since 1970 (UTC).
    """

    job_id: ShortId
    job_name: Name
    version: Count
    kind: Literal["train", "gradient"]
    assignment_id: ShortId
    released: History | None
    wall_s: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Account:
    """All that was released, in one job or in all.

    Attributes:
        name: of the job.
        updates: how many were made.
        unprotected: how many of them nothing hides.
        histories: one for each unit, adjacency and trust.
    """

    name: str = ""
    updates: int = 0
    unprotected: int = 0
    histories: tuple[History, ...] = ()

    def then(self, released: History | None) -> Account:
        """Return the account after one more update."""
        if released is None:
            return replace(self, updates=self.updates + 1, unprotected=self.unprotected + 1)
        kept = {_kind_of(history): history for history in self.histories}
        kind = _kind_of(released)
        kept[kind] = functools.reduce(History.then, released.releases, kept.get(kind, _nothing(released)))
        return replace(self, updates=self.updates + 1, histories=tuple(kept.values()))

    @property
    def history(self) -> History | None:
        """What is to be accounted for; None: nothing, or there is no bound as some updates were left unprotected."""
        if self.unprotected or not self.histories:
            return None
        return self.histories[0].ordered() if len(self.histories) == 1 else composed(self.histories)


@dataclass
class Accounts:
    """Each job's account; grows only."""

    jobs: dict[str, Account] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Note an update."""
        self.jobs[entry.job_id] = self.of(entry.job_id, entry.job_name).then(entry.released)

    def of(self, job_id: str, name: str = "") -> Account:
        """Return a job's account."""
        return self.jobs.get(job_id, Account(name))

    def in_all(self) -> Account:
        """Return the account of all jobs together."""
        every = self.jobs.values()
        histories = tuple(history for account in every for history in account.histories)
        return Account(
            "",
            sum(account.updates for account in every),
            sum(account.unprotected for account in every),
            (composed(histories),) if histories else (),
        )


def composed(histories: Iterable[History]) -> History:
    """Return several histories of the same client as one, with adjacency zero-out.

    Its unit is the client if that is the unit of all. Else it is the example, and a client that has its say as a whole
    is one whose contribution an example replaces by another: zero-out of one, replacement of the other.
    """
    every = tuple(histories)
    unit = Unit.CLIENT if all(each.unit is Unit.CLIENT for each in every) else Unit.EXAMPLE
    counts: Counter[Release] = Counter()
    for history in every:
        is_replaced = history.unit is not unit
        for release in history.releases:
            counts[(_replaced(release) if is_replaced else release).once()] += release.count
    return History(
        unit=unit,
        adjacency=Adjacency.ZERO_OUT,
        trust=max((each.trust for each in every), key=_FROM_BEST.index),
        releases=tuple(once.model_copy(update={"count": count}) for once, count in counts.items()),
    ).ordered()


def _replaced(release: Release) -> Release:
    """Return what costs under zero-out as much as `release` does when a contribution is replaced by any other.

    A vector within a clip then moves twice as far. What is accounted for by the worst two values of each coordinate
    stays as it is.
    """
    return release.model_copy(update={"mechanisms": tuple(_twice_as_far(each) for each in release.mechanisms)})


def _twice_as_far(mechanism: Mechanism) -> Mechanism:
    match mechanism:
        case Gaussian(noise_multiplier=multiplier):
            return mechanism.model_copy(update={"noise_multiplier": multiplier / 2})
        case ClipCount(std=std):
            return mechanism.model_copy(update={"std": std / 2})
        case Rqm(l2_clip=float(l2_clip)):
            return mechanism.model_copy(update={"l2_clip": 2 * l2_clip})
    return mechanism


def _nothing(history: History) -> History:
    return history.model_copy(update={"releases": ()})


def _kind_of(history: History) -> tuple[Unit, Adjacency, Trust]:
    return history.unit, history.adjacency, history.trust
