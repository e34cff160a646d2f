"""What a private job's client does to an update after training and before any codec: clip it, add its noise.

Order matters, so it is all in one place: training, clip, noise, compression.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from fedclient.clipping import clipped, noise_of_a_client, noised
from fedcore.draws import KEY_BYTES, PrivateDraws
from fedcore.jobfile import Job
from fedcore.layout import Vector
from fedcore.messages import Assignment
from fedcore.privacy import DpFedAvg


class Hidden(NamedTuple):
    """An update that may leave; `within_clip` as in `UpdateHeader`."""

    delta_D: Vector  # noqa: N815 - shape suffix
    within_clip: int | None = None


def draws_of(job: Job, assignment: Assignment, client: str) -> PrivateDraws | None:
    """Return what hides one piece of work: nobody can draw it again, unless the job says that everybody may.

    None for a job that is not private.
    """
    if job.privacy is None:
        return None
    if job.privacy.unsafe_seed is None:
        return PrivateDraws(os.urandom(KEY_BYTES))
    keys = (b"client", client.encode(), str(assignment.seed).encode())
    return PrivateDraws(str(job.privacy.unsafe_seed).encode(), *keys)


def hidden(job: Job, assignment: Assignment, delta_D: Vector, draws: PrivateDraws | None) -> Hidden:
    """Return an update as the job's mechanism lets it leave; of examples that are hidden by training, as it is."""
    section = job.privacy
    if draws is None or not isinstance(section, DpFedAvg):
        return Hidden(delta_D)
    clip = assignment.clip if section.adaptive is not None and assignment.clip else section.clip
    short_D = clipped(delta_D, clip)
    std = noise_of_a_client(job, section.multiplier, clip)
    if section.adaptive is None:
        return Hidden(noised(short_D, std, draws))
    norm = float(np.linalg.norm(delta_D.astype(np.float64)))
    return Hidden(noised(short_D, std, draws), int(norm <= clip))
