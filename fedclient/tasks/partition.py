"""Deals rows out to shards: each row to exactly one, the same for the same generator.

Shape legend: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fedcore.errors import InvalidInput
from fedcore.params import Params

Rows = npt.NDArray[np.int64]


class Partition(Params):
    """How rows are dealt out to shards; a task's parameter."""

    kind: Literal["iid", "dirichlet", "column", "files"] = Field(
        default="iid",
        description="Evenly at random; each value of a column in uneven shares; each value of a column to one shard;"
        " each file to one shard.",
    )
    alpha: float = Field(default=0.5, gt=0, le=1e6, description="Of dirichlet: the smaller, the less even.")
    column: str | None = Field(default=None, min_length=1, description="Of dirichlet and column.")

    @model_validator(mode="after")
    def _column_where_it_is_used(self) -> Self:
        if (self.kind in {"dirichlet", "column"}) != (self.column is not None):
            raise ValueError(f"kind {self.kind!r} {'takes no' if self.column else 'needs a'} column")
        return self


def deal_evenly(num_rows: int, num_shards: int, generator: np.random.Generator) -> list[Rows]:
    """Return the rows of each shard; their numbers differ by one at most.

    Raises:
        InvalidInput: there are fewer rows than shards.
    """
    _check(num_rows, "rows", num_shards)
    return [np.sort(part) for part in np.array_split(generator.permutation(num_rows), num_shards)]


def deal_dirichlet(
    labels_N: Sequence[str], num_shards: int, alpha: float, generator: np.random.Generator
) -> list[Rows]:
    """Return the rows of each shard: those of one label in shares that are drawn from Dirichlet(alpha).

    A shard that came out empty gets one row of the largest. Yurochkin et al., Bayesian Nonparametric Federated Learning
    of Neural Networks, 2019, section 4.

    Raises:
        InvalidInput: there are fewer rows than shards.
    """
    _check(len(labels_N), "rows", num_shards)
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    for rows in _rows_by_value(labels_N):
        shuffled = generator.permutation(rows)
        cuts = np.rint(np.cumsum(generator.dirichlet(np.full(num_shards, alpha)))[:-1] * len(rows)).astype(np.int64)
        for shard, part in zip(shards, np.split(shuffled, cuts), strict=True):
            shard.extend(part.tolist())
    while not (smallest := min(shards, key=len)):
        smallest.append(max(shards, key=len).pop())
    return [np.sort(np.array(shard, dtype=np.int64)) for shard in shards]


def deal_by_value(values_N: Sequence[str], num_shards: int) -> list[Rows]:
    """Return the rows of each shard: value i, in the order of the alphabet, goes to shard i, and around again.

    Raises:
        InvalidInput: there are fewer values than shards.
    """
    groups = _rows_by_value(values_N)
    _check(len(groups), "different values", num_shards)
    return [np.sort(np.concatenate(groups[shard::num_shards])) for shard in range(num_shards)]


def _rows_by_value(values_N: Sequence[str]) -> list[Rows]:
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(values_N):
        groups.setdefault(value, []).append(row)
    return [np.array(groups[value], dtype=np.int64) for value in sorted(groups)]


def _check(number: int, what: str, num_shards: int) -> None:
    if number < num_shards:
        raise InvalidInput(f"{number} {what} are too few for {num_shards} shards")
