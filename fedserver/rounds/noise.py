"""Noise that the server adds to what clients have clipped, so that versions hide each client.

McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, 2018; Andrew, Thakkar,
McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, 2021, for the clip that follows the norms.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedcore.draws import KEY_BYTES, PrivateDraws
from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.layout import Vector
from fedcore.messages import WorkKind
from fedcore.part import Part
from fedcore.privacy import MAX_CLIP, DpFedAvg
from fedprivacy.jobs import Accounting, count_std, update_multiplier
from fedserver.rounds.attempt import Attempt
from fedserver.state.records import VersionRecord

MIN_CLIP: Final = 1e-6
"""That follows the norms: below it nobody learns anything any more."""


@dataclass(frozen=True)
class Noise:
    """What is added to one version.

    Attributes:
        std: on each value of the clients' sum.
        share: of one client in the mean. With cohorts that are drawn in secret it is one of all that were asked,
            whoever of them has answered: the accounting is for a sum of so many, of which some may be zero.
        given: of one client in the mean as it comes.
    """

    std: float
    share: float
    given: float
    draws: PrivateDraws

    def on_sum(self, total_D: npt.NDArray[np.float64]) -> None:
        """Add to the clients' sum, in place; each value must come once."""
        total_D += self.std * self.draws.standard_normal(total_D.size)

    def on_mean(self, means: Iterable[Vector]) -> Iterator[Vector]:
        """Return the clients' mean with noise, block by block."""
        for mean in means:
            wide = mean.astype(np.float64) * (self.share / self.given)
            yield (wide + self.share * self.std * self.draws.standard_normal(mean.size)).astype(np.float32)


def clip_of(section: DpFedAvg, latest: VersionRecord | None) -> float:
    """Return the largest norm of updates that are computed from a version."""
    return section.clip if latest is None or latest.clip is None else latest.clip


def noise_of(accounting: Accounting | None, attempt: Attempt, latest: VersionRecord, *, start: bool) -> Noise | None:
    """Return what the server adds to a version; None: it adds nothing.

    Args:
        accounting: of the job; None: it is not private.
        attempt: sealed.
        latest: what the updates were computed from.
        start: whether these are gradients for the job's start.
    """
    if accounting is None or not isinstance(accounting.section, DpFedAvg) or accounting.section.noise != "server":
        return None
    section, count = accounting.section, len(attempt.headers)
    clip, multiplier = clip_of(section, latest), section.multiplier
    std = count_std(section, accounting.job.schedule.cohort)
    if start:
        assert section.start is not None
        clip, multiplier = section.start.clip, section.start.noise_multiplier
    elif std is not None:
        multiplier = update_multiplier(multiplier, std)
    among = len(attempt.assignments) if section.secret_cohort else count
    return Noise(clip * multiplier, 1 / among, 1 / count, draws_for(section, attempt, "values"))


def follows_norms(accounting: Accounting | None) -> bool:
    """Whether the clip follows the updates' norms, so that each client says whether its own was below."""
    section = None if accounting is None else accounting.section
    return isinstance(section, DpFedAvg) and section.adaptive is not None


def next_clip(accounting: Accounting | None, attempt: Attempt, latest: VersionRecord | None) -> float | None:
    """Return the clip after a version; None: the job's stays.

    With b the noised share of the updates that were no longer than C, it is C · exp(−rate · (b − quantile)).
    """
    section = None if accounting is None else accounting.section
    if accounting is None or not isinstance(section, DpFedAvg) or section.adaptive is None:
        return None
    std = count_std(section, accounting.job.schedule.cohort)
    assert std is not None
    among = len(attempt.assignments) if section.secret_cohort else len(attempt.headers)
    votes = sum(0.5 if header.within_clip else -0.5 for header in attempt.headers.values())
    noised = votes + std * float(draws_for(section, attempt, "count").standard_normal(1)[0])
    move = section.adaptive.rate * (noised / among + 0.5 - section.adaptive.quantile)
    logarithm = math.log(clip_of(section, latest)) - move
    return math.exp(min(max(logarithm, math.log(MIN_CLIP)), math.log(MAX_CLIP) - 1e-9))


def draws_for(section: DpFedAvg, attempt: Attempt, what: str) -> PrivateDraws:
    """Return where noise is drawn from: nobody can draw it again, unless the job says that everybody may."""
    if section.unsafe_seed is None:
        return PrivateDraws(os.urandom(KEY_BYTES))
    place = (attempt.kind.value, str(attempt.version), str(attempt.record.attempt))
    return PrivateDraws(str(section.unsafe_seed).encode(), b"server", *(part.encode() for part in (what, *place)))


def largest_norm(accounting: Accounting | None, kind: WorkKind, latest: VersionRecord | None) -> float | None:
    """Return how long what a client sends may be in L2 norm, where the server's noise is for no more; None: any."""
    section = None if accounting is None else accounting.section
    if not isinstance(section, DpFedAvg) or section.noise != "server" or latest is None:
        return None
    if kind is WorkKind.GRADIENT:
        return None if section.start is None else section.start.clip
    return clip_of(section, latest)


def within(parts: Iterable[Part], norm: float) -> Iterator[Part]:
    """Pass on an update, unless it is longer than `norm`; what rounding may have added is let pass.

    Raises:
        UpdateRejected: OUT_OF_BOUNDS, behind the last part.
    """
    squares = 0.0
    for part in parts:
        values = part.values_n.astype(np.float64)
        squares += float(values @ values) + (part.size - values.size) * float(part.rest) ** 2
        yield part
    if not math.sqrt(squares) <= norm * (1 + 1e-6):
        text = f"an update of L2 norm {math.sqrt(squares):g}, the job's clip is {norm:g}"
        raise UpdateRejected(UpdateResult.OUT_OF_BOUNDS, text)
