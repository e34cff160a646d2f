"""What a private job's client does to a whole vector before it leaves: clip it, and add noise.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

import math

import numpy as np

from fedcore.draws import PrivateDraws
from fedcore.errors import InvalidInput
from fedcore.jobfile import Job
from fedcore.layout import Vector
from fedcore.privacy import DpFedAvg, DpSgd


class CannotHide(InvalidInput):
    """A private job's examples cannot be hidden by this client; the text is not of the data."""


_MARGIN = 1 - 1e-9  # what rounding in float64 can add to a norm


def clipped(delta_D: Vector, clip: float) -> Vector:
    """Return the vector, scaled to L2 norm `clip` where it is longer: also in float32, it is never above.

    What holds a value that is not finite becomes zero: it has no norm, and must not leave.
    """
    exact_D = delta_D.astype(np.float64)
    norm = float(np.linalg.norm(exact_D))
    if not math.isfinite(norm):
        return np.zeros_like(delta_D)
    if norm <= clip:
        return delta_D
    exact_D *= clip / norm * _MARGIN
    rounded_D = exact_D.astype(np.float32)
    outward_D = np.abs(rounded_D) > np.abs(exact_D)
    rounded_D[outward_D] = np.nextafter(rounded_D[outward_D], np.float32(0))
    return rounded_D


def noised(delta_D: Vector, std: float, draws: PrivateDraws) -> Vector:
    """Return the vector plus a normal draw of standard deviation `std` for each value; summed in float64."""
    if not std:
        return delta_D
    noisy_D: Vector = (delta_D + std * draws.standard_normal(delta_D.size)).astype(np.float32)
    return noisy_D


def noise_of_a_client(job: Job, multiplier: float, clip: float) -> float:
    """Return the standard deviation of the noise that each client adds to a whole vector clipped to `clip`.

    0 where the server adds it. Of `rqm` it is for the start alone, whoever is trusted. With ``noise = "clients"``, as
    many clients as close a round at its deadline add up to `multiplier` · `clip`.
    """
    match job.privacy:
        case DpFedAvg(noise="clients"):
            return multiplier * clip / math.sqrt(job.schedule.updates_at_deadline)
        case None | DpSgd() | DpFedAvg(noise="server"):
            return 0.0
        case _:
            return multiplier * clip
