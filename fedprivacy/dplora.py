"""DP-LoRA as its paper has it, under its own name, with what its noise really guarantees.

Liu, Zhu, Zha and others: Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning,
2023. In each round a client clips the gradient of a batch, adds normal noise of σ clips, and sends what a step made
of it. σ is not an epsilon, and nothing is drawn at random that would amplify. What is left open decides by how much a
neighbour moves the clipped gradient, so there are several readings. Clipping per example and Poisson sampling, as in
DP-SGD, is the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprivacy.events import Adjacency, Gaussian, History, Release, Trust, Unit


@dataclass(frozen=True)
class Reading:
    """One way to understand the paper.

    Attributes:
        name: for machines.
        text: what is clipped, and what a neighbour changes.
    """

    name: str
    text: str
    history: History


def readings(noise_multiplier: float, rounds: int) -> list[Reading]:
    """Return the ways to read the paper, the cheapest first.

    Args:
        noise_multiplier: σ, the standard deviation over the clip.
        rounds: T, how often a client sends.

    Raises:
        ValidationError: an argument is out of bounds.
    """
    one, two = (Gaussian(noise_multiplier=noise_multiplier),), (Gaussian(noise_multiplier=noise_multiplier),) * 2

    def of(name: str, text: str, mechanisms: tuple[Gaussian, ...], unit: Unit, adjacency: Adjacency) -> Reading:
        release = Release(mechanisms=mechanisms, count=rounds)
        return Reading(name, text, History(unit=unit, adjacency=adjacency, trust=Trust.LOCAL, releases=(release,)))

    return [
        of(
            "client-one-clip",
            "A and B clipped as one; a client's gradient or zero",
            one,
            Unit.CLIENT,
            Adjacency.ZERO_OUT,
        ),
        of(
            "client-two-clips",
            "A and B clipped each; a client's gradient or zero",
            two,
            Unit.CLIENT,
            Adjacency.ZERO_OUT,
        ),
        of(
            "example-one-clip",
            "A and B clipped as one, of a batch's mean; one example replaced",
            one,
            Unit.EXAMPLE,
            Adjacency.REPLACE,
        ),
        of(
            "example-two-clips",
            "A and B clipped each, of a batch's mean; one example replaced",
            two,
            Unit.EXAMPLE,
            Adjacency.REPLACE,
        ),
    ]
