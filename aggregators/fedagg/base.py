"""The contract of an aggregation rule: updates in, one step out, in memory that does not grow with their number.

A rule has one of the shapes of README.md. `Rule` is what all have in common; `FoldRule` adds updates up as they come,
`FactorRule` puts the low-rank factors of all clients together, one adapted matrix after the other.

Shape legend: D values in the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Protocol, Self, runtime_checkable

import numpy as np
from pydantic import JsonValue

from fedagg.lowrank.factors import Factors
from fedcore.errors import InvalidInput
from fedcore.layout import Vector
from fedcore.part import Part

BLOCK_VALUES: Final = 1 << 18
"""Values in a block of the mean unless the caller says otherwise: 1 MiB of float32."""

MAX_WEIGHT: Final = 1 << 31
MAX_COUNT_BITS: Final = 40
MIN_ABS: Final = float(np.finfo(np.float32).tiny)
# Well below the end of float32, so that a mean at the bound may be rounded up and stays finite.
MAX_ABS: Final = 2.0**100


def ceil_log2(count: int) -> int:
    """Return the smallest b with count ≤ 2^b, for count ≥ 1."""
    return (count - 1).bit_length()


@dataclass(frozen=True)
class Capacity:
    """How much one fold may be given; whatever stays within it cannot overflow the fold.

    Attributes:
        max_updates: most updates of one version, at least 1.
        max_weight: largest weight of one update, 1 to 2^31.
        max_abs: largest magnitude of one value, 2^-126 to 2^100. An exact fold resolves values relative
            to this bound, so it should be no larger than honest updates need.
    """

    max_updates: int
    max_weight: int
    max_abs: float

    def __post_init__(self) -> None:
        """Check the bounds, and that an exact sum in 64 bits keeps at least 22 bits of a value of weight 1.

        Raises:
            InvalidInput: a bound is out of bounds, or updates and weight together need more than 40 bits.
        """
        if self.max_updates < 1:
            raise InvalidInput(f"max_updates {self.max_updates}: at least 1")
        if not 1 <= self.max_weight <= MAX_WEIGHT:
            raise InvalidInput(f"max_weight {self.max_weight}: from 1 to {MAX_WEIGHT}")
        if not MIN_ABS <= self.max_abs <= MAX_ABS:
            raise InvalidInput(f"max_abs {self.max_abs}: from {MIN_ABS} to {MAX_ABS}")
        bits = ceil_log2(self.max_updates) + ceil_log2(self.max_weight)
        if bits > MAX_COUNT_BITS:
            raise InvalidInput(
                f"{self.max_updates} updates of weight up to {self.max_weight} need {bits} bits of an exact sum, at"
                f" most {MAX_COUNT_BITS}: lower the largest weight or the number of updates"
            )


@dataclass(frozen=True)
class RuleTraits:
    """What a rule is, for the check of a whole job before it starts.

    Attributes:
        shape: how it reads updates: folded on arrival, or matrix by matrix as low-rank factors when all are there.
        streams: an update is done with once it was given; nothing of it has to be kept for the rule.
        exact: the same updates give the same bits in any order and any grouping.
        needs_all: nothing can be computed before the last update is there.
    """

    shape: Literal["fold", "factors"]
    streams: bool
    exact: bool
    needs_all: bool


class Fold(Protocol):
    """The open version's accumulator.

    Not thread-safe: one caller at a time, which may be a worker thread.
    """

    @property
    def num_updates(self) -> int:
        """How many updates were added."""
        ...

    @property
    def total_weight(self) -> int:
        """The sum of their weights."""
        ...

    def add(self, parts: Iterable[Part], weight: int) -> None:
        """Add one update of weight `weight`.

        `parts`, one after the other, are the D values of the update. They are read once, in order, and not kept or
        changed; values that a part does not give one by one are not built. The caller has checked that every
        value is finite and of magnitude at most the capacity's `max_abs`; the fold does not look again, and
        its sums mean nothing if the caller did not.

        Raises:
            ValueError: `weight` is below 1 or above the capacity's, or the fold has its `max_updates`
                already: nothing was changed. Or the parts hold no float32 vectors or not D values in all,
                or an earlier `add` failed in this way: the fold is broken.
            Exception: whatever `parts` raises passes through; the fold is broken.

        A broken fold holds a part of an update that nobody can take out: every later call raises
        ValueError, and the caller folds the journaled updates into a new one. Its counts stay those of the
        whole updates.
        """
        ...

    def clear(self) -> None:
        """Forget every update: the fold is as it was when it was opened, in the same memory. Mends a broken one."""
        ...

    def mean_blocks(self, block_values: int = BLOCK_VALUES) -> Iterator[Vector]:
        """Return the aggregate as new float32 blocks of `block_values` values, the last one shorter, D in all.

        Reads only; adding may go on afterwards, but not while the blocks are read.

        Raises:
            ValueError: on the call, if there are no updates yet, the fold is broken, or `block_values` is
                below 1.
        """
        ...


class Rule(Protocol):
    """A rule with its parameters; derive from `fedcore.plugin.Plugin` to get `configure` and `params`.

    Immutable; may be shared between threads.
    """

    name: ClassVar[str]
    traits: ClassVar[RuleTraits]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the rule with these parameters.

        Raises:
            InvalidInput: a parameter is unknown (the nearest known one is named), missing or out of bounds.
        """
        ...

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter; `configure` takes them back."""
        ...


@runtime_checkable
class FoldRule(Rule, Protocol):
    """A rule whose updates are done with once they were given."""

    def open(self, num_values: int, capacity: Capacity) -> Fold:
        """Return an empty fold of D = `num_values` values.

        Raises:
            ValueError: `num_values` is below 1.
        """
        ...


@dataclass(frozen=True, eq=False)
class Merged:
    """What a `FactorRule` makes of one adapted matrix.

    Attributes:
        factors: what all clients go on from, of the same rank, shape and scale as before.
        change: what every client adds to the frozen matrix, with scale 1; None: nothing.
    """

    factors: Factors
    change: Factors | None = None


@runtime_checkable
class FactorRule(Rule, Protocol):
    """A rule over the factors B and A of each adapted matrix, which need not have the same rank at all clients.

    Attributes:
        changes_base: whether the frozen matrices change, so that who joins late needs every change so far.
        unequal_ranks: whether clients may have different ranks.
    """

    changes_base: ClassVar[bool]
    unequal_ranks: ClassVar[bool]

    def merge(
        self, base: Factors, clients: Sequence[Factors], weights: Sequence[int], fresh: np.random.Generator
    ) -> Merged:
        """Return what one matrix becomes.

        Args:
            base: the factors that clients trained from, or of which they had the leading ranks.
            clients: what they made of them, at least one.
            weights: one for each, above 0.
            fresh: the source of what is drawn; the same for the same job, version and matrix.

        Raises:
            InvalidInput: a result is not finite, or clients do not fit together.
        """
        ...
