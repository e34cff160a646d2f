"""What was released, as values: what a ledger keeps and an accountant adds up.

A `Release` is what one round lets out; a `History` is all that one job has let out, and what its guarantee is about.
Each becomes JSON and back without loss.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from fedcore.errors import InvalidInput
from fedcore.params import Params
from fedcore.validation import problems_of

ModelT = TypeVar("ModelT", bound=Params)

MAX_LEVELS: Final = 64
"""Of RQM: a search for the worst case takes levels³ steps, and more levels only cost more privacy."""
MAX_TRIALS: Final = 256
MAX_COUNT: Final = 10**9
MAX_BOUND: Final = 2.0**100
MIN_EXTENSION: Final = 2.0**-20
"""Of the clip, as in the codec `rqm`."""


class Unit(StrEnum):
    """What may differ between two data sets that must look alike."""

    EXAMPLE = "example"
    CLIENT = "client"


class Adjacency(StrEnum):
    """How it may differ; of data sets that are neighbours."""

    ADD_OR_REMOVE = "add-or-remove-one"
    REPLACE = "replace-one"
    ZERO_OUT = "zero-out"


class Trust(StrEnum):
    """Who may see what lies before the noise."""

    LOCAL = "local"
    SECURE_SUM = "secure-sum"
    DISTRIBUTED = "distributed"
    CENTRAL = "central"


class Everyone(Params):
    """Nobody is drawn: whatever the unit is, it took part."""

    kind: Literal["everyone"] = "everyone"


class Poisson(Params):
    """Each unit takes part with probability `rate`, independently of all others, drawn anew for each release."""

    kind: Literal["poisson"] = "poisson"
    rate: Annotated[float, Field(gt=0, lt=1, description="Probability that a unit takes part.")]


class FixedSize(Params):
    """`size` units of `population`, without replacement, uniformly, drawn anew for each release."""

    kind: Literal["fixed-size"] = "fixed-size"
    size: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    population: Annotated[int, Field(ge=1, le=MAX_COUNT)]

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Self:
        if self.size > self.population:
            raise ValueError(f"size {self.size}: at most population {self.population}")
        return self


Sampling = Annotated[Everyone | Poisson | FixedSize, Field(discriminator="kind")]


class Gaussian(Params):
    """A sum of vectors, each of ℓ2 norm at most a clip, plus normal noise in every coordinate."""

    kind: Literal["gaussian"] = "gaussian"
    noise_multiplier: Annotated[
        float, Field(ge=1e-3, le=MAX_BOUND, description="Standard deviation of the noise, over the clip of one unit.")
    ]


class ClipCount(Params):
    """How many norms were below the clip: a sum of ±1/2, plus normal noise.

    Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, 2021.
    """

    kind: Literal["clip-count"] = "clip-count"
    std: Annotated[float, Field(ge=1e-3, le=MAX_BOUND, description="Standard deviation of the noise, in units.")]


class Rqm(Params):
    """Levels of the codec `rqm`, of which only the sum over `clients` is seen.

    `clients` is how many were in the sum in the end; 1 is what a server without a secure sum sees of each.
    """

    kind: Literal["rqm"] = "rqm"
    levels: Annotated[int, Field(ge=2, le=MAX_LEVELS)] = 16
    keep: Annotated[float, Field(gt=0, lt=1, description="Probability with which an inner level is kept.")] = 0.42
    clip: Annotated[float, Field(ge=1 / MAX_BOUND, le=MAX_BOUND, description="Largest magnitude of a value.")] = 1.0
    extension: Annotated[float, Field(ge=1 / MAX_BOUND / 2**20, le=MAX_BOUND)] = 1.0
    clients: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    dimension: Annotated[int, Field(ge=1, le=MAX_COUNT, description="Values in a vector.")] = 1
    l2_clip: Annotated[
        float | None, Field(gt=0, le=MAX_BOUND, description="Largest ℓ2 norm of a vector, before the levels.")
    ] = None

    @model_validator(mode="after")
    def _levels_go_beyond_the_clip(self) -> Self:
        if self.extension < MIN_EXTENSION * self.clip:
            raise ValueError(f"extension {self.extension}: at least {MIN_EXTENSION} of clip {self.clip}")
        return self


class Pbm(Params):
    """The Poisson binomial mechanism: `trials` coins of probability 1/2 + theta · x / clip, summed over `clients`.

    Chen, Özgür, Kairouz: The Poisson Binomial Mechanism for Unbiased Federated Learning with Secure Aggregation, 2022.
    """

    kind: Literal["pbm"] = "pbm"
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 15
    theta: Annotated[float, Field(gt=0, lt=0.5)] = 0.25
    clients: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    dimension: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1


Mechanism = Annotated[Gaussian | ClipCount | Rqm | Pbm, Field(discriminator="kind")]
Discrete = Rqm | Pbm


class Release(Params):
    """What one round lets out of those who took part: the mechanisms share one draw of them.

    Attributes:
        count: how often this happened, each time with draws of its own.
    """

    mechanisms: Annotated[tuple[Mechanism, ...], Field(min_length=1, max_length=16)]
    sampling: Sampling = Everyone()
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1

    @model_validator(mode="after")
    def _levels_gain_nothing_from_sampling(self) -> Self:
        if not isinstance(self.sampling, Everyone) and any(isinstance(each, Discrete) for each in self.mechanisms):
            raise ValueError("rqm and pbm are accounted for those who took part: sampling must be everyone")
        return self

    def once(self) -> Release:
        """Return the release as if it had happened once."""
        return self.model_copy(update={"count": 1})


class History(Params):
    """All that was released, in any order, and between which neighbours it is measured.

    Raises:
        ValidationError: releases that this adjacency has no accounting for. Poisson sampling changes how many take
            part, so it goes with add-or-remove-one and zero-out; fixed-size sampling and sums over a known
            number of clients do not, so they go with replace-one (sums with zero-out too).
    """

    unit: Unit
    adjacency: Adjacency = Adjacency.ADD_OR_REMOVE
    trust: Trust = Trust.CENTRAL
    releases: tuple[Release, ...] = ()

    @model_validator(mode="after")
    def _can_be_accounted_for(self) -> Self:
        for release in self.releases:
            kinds: list[object] = [release.sampling, *release.mechanisms]
            for kind, refused in _REFUSED.items():
                if self.adjacency in refused and any(isinstance(each, kind) for each in kinds):
                    name = kind.model_fields["kind"].default
                    raise ValueError(f"{name} cannot be accounted for with adjacency {self.adjacency.value}")
        return self

    def then(self, release: Release) -> History:
        """Return the history after one more release; equal releases are counted, so that it stays short."""
        kept = list(self.releases)
        for index, known in enumerate(kept):
            if known.once() == release.once():
                kept[index] = known.model_copy(update={"count": known.count + release.count})
                break
        else:
            kept.append(release)
        return History(unit=self.unit, adjacency=self.adjacency, trust=self.trust, releases=tuple(kept))

    def ordered(self) -> History:
        """Return the history with its releases in an order that does not tell which came first."""
        releases = tuple(sorted(self.releases, key=lambda each: each.model_dump_json()))
        return self.model_copy(update={"releases": releases})

    def to_json(self) -> str:
        """Return the history as one line of JSON, such that `from_json` gives it back."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> History:
        """Return what `to_json` wrote.

        Raises:
            InvalidInput: it is not JSON, or not a history; each problem with its key path.
        """
        try:
            tree: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"privacy history: not JSON: {error}") from error
        if not isinstance(tree, dict):
            raise InvalidInput(f"privacy history: an object is needed, not {type(tree).__name__}")
        return make(cls, tree, "privacy history")


_REFUSED: Final[dict[type[Params], set[Adjacency]]] = {
    Poisson: {Adjacency.REPLACE},
    FixedSize: {Adjacency.ADD_OR_REMOVE, Adjacency.ZERO_OUT},
    Rqm: {Adjacency.ADD_OR_REMOVE},
    Pbm: {Adjacency.ADD_OR_REMOVE},
}


def make(model: type[ModelT], tree: dict[str, Any], where: str) -> ModelT:
    """Return plain values as one of the values above.

    Raises:
        InvalidInput: each problem with its key path below `where`.
    """
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except RecursionError as error:  # a little less deep than Python reads
        raise InvalidInput(f"{where}: nested too deep") from error
    except ValidationError as error:
        raise InvalidInput("; ".join(problems_of(error, model, tree, where))) from error
