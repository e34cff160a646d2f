"""What is guaranteed, printed whole: a number without its conditions is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from fedprivacy.events import (
    Adjacency,
    Everyone,
    FixedSize,
    Gaussian,
    History,
    Pbm,
    Poisson,
    Rqm,
    Sampling,
    Trust,
    Unit,
)

_UNITS: Final = {
    Unit.EXAMPLE: "one example of one client",
    Unit.CLIENT: "one client with all its data",
}
_ADJACENCIES: Final = {
    Adjacency.ADD_OR_REMOVE: "is there or is not",
    Adjacency.REPLACE: "is replaced by any other",
    Adjacency.ZERO_OUT: "contributes, or contributes zero",
}
_TRUSTS: Final = {
    Trust.LOCAL: "local: the server sees what each client sends, and need not be trusted",
    Trust.SECURE_SUM: "secure sum: the server sees only the cohort's sum, and clients count on each other's noise",
    Trust.DISTRIBUTED: "distributed: each client adds a share of the noise, and who reads single updates is trusted",
    Trust.CENTRAL: "central: who adds the noise sees everything before it, and is trusted",
}


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ)-differential privacy, with everything that it depends on.

    Attributes:
        epsilon: the smaller of the two below, both of which are upper bounds.
        delta: the chance, roughly, with which epsilon may not hold.
        unit: what may differ.
        adjacency: how.
        trust: who sees what lies before the noise.
        sampling: what is assumed of who takes part, each once.
        accountant: which of them that is, and the version.
        epsilon_pld: by privacy loss distributions; None where only Rényi divergences are known.
        epsilon_rdp: by Rényi divergences.
        not_covered: what it says nothing about.
    """

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    trust: Trust
    sampling: tuple[str, ...]
    accountant: str
    epsilon_pld: float | None
    epsilon_rdp: float
    not_covered: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; infinity is null, as JSON has none."""
        tree = asdict(self)
        for key in ("epsilon", "epsilon_pld", "epsilon_rdp"):
            tree[key] = None if tree[key] == math.inf else tree[key]
        return tree | {"sampling": list(self.sampling), "not_covered": list(self.not_covered)}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Guarantee:
        """Return what `as_json` has given."""
        numbers = {key: math.inf if tree[key] is None else tree[key] for key in ("epsilon", "epsilon_rdp")}
        enums = {"unit": Unit(tree["unit"]), "adjacency": Adjacency(tree["adjacency"]), "trust": Trust(tree["trust"])}
        texts = {key: tuple(tree[key]) for key in ("sampling", "not_covered")}
        return Guarantee(**{**tree, **numbers, **enums, **texts})

    def rows(self) -> list[tuple[str, str]]:
        """Return what people read: name and text."""
        return [
            ("epsilon", f"{self.epsilon:.4g}"),
            ("delta", f"{self.delta:.3g}"),
            ("unit", f"{_UNITS[self.unit]} ({self.unit})"),
            ("adjacency", f"the unit {_ADJACENCIES[self.adjacency]} ({self.adjacency})"),
            ("trust", _TRUSTS[self.trust]),
            *(("sampling", text) for text in self.sampling),
            ("accountant", self.accountant),
            ("epsilon (PLD)", "not known" if self.epsilon_pld is None else f"{self.epsilon_pld:.4g}"),
            ("epsilon (RDP)", f"{self.epsilon_rdp:.4g}"),
            *(("not covered", text) for text in self.not_covered),
        ]

    def text(self) -> str:
        """Return `rows` as lines."""
        return "\n".join(f"{name}: {text}" for name, text in self.rows())


def sampling_texts(history: History) -> tuple[str, ...]:
    """Return what the releases assume of who takes part."""
    return tuple(dict.fromkeys(_sampling_text(release.sampling) for release in history.releases)) or (
        "nothing released",
    )


def _sampling_text(sampling: Sampling) -> str:
    match sampling:
        case Everyone():
            return "none: the unit is taken to be in every release"
        case Poisson(rate=rate):
            return (
                f"Poisson: each unit is in a release with probability {rate:g}, independently, and nobody learns which"
            )
        case FixedSize(size=size, population=population):
            return f"{size} of {population} without replacement, uniformly, and nobody learns which"


def not_covered(history: History) -> tuple[str, ...]:
    """Return what a guarantee for these releases says nothing about."""
    mechanisms = [each for release in history.releases for each in release.mechanisms]
    found = [
        "whatever else leaves: losses, numbers of examples, who took part and when",
        "other jobs on the same data, whose epsilons add to this one",
        "choices made on the same data: learning rate, clip, number of rounds",
    ]
    if history.unit is Unit.EXAMPLE:
        found.append(
            "what all of a client's examples have in common, and a text that the task makes several examples of"
        )
    if history.trust is Trust.CENTRAL:
        found.append("the one who adds the noise, and whoever reads updates on their way there")
    if history.trust is Trust.DISTRIBUTED:
        found.append("whoever reads updates before they are summed, and clients who tell their own noise")
    if any(isinstance(each, Gaussian) for each in mechanisms):
        found.append("noise in floating point: the proof is of real numbers")
    if any(isinstance(each, Rqm | Pbm) and each.clients > 1 for each in mechanisms):
        found.append("sums over fewer clients than stated, and clients who tell their own levels")
    if any(isinstance(each, Rqm | Pbm) for each in mechanisms):
        found.append("draws that somebody can repeat")
    return tuple(found)
