"""Which rows and figures of a history are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

Row = Mapping[str, Any]

_FIRST: Final = ("accuracy", "loss")
_COUNT: Final = "num_examples"


def metric_names(rows: Sequence[Row], at_most: int) -> list[str]:
    """Return the metrics of the evaluations: accuracy and loss first, then by name."""
    names = {name for row in rows for name in row["evaluation"]} - {_COUNT}
    ordered = [name for name in _FIRST if name in names] + sorted(names - set(_FIRST))
    return ordered[:at_most]


def evaluated(rows: Sequence[Row]) -> list[Row]:
    """Return the versions that clients have measured."""
    return [row for row in rows if row["evaluation"]]


def held_out_examples(row: Row) -> int:
    """Return on how many examples a version was measured."""
    return int(row["evaluation"].get(_COUNT, 0))


def spread(rows: Sequence[Row], at_most: int) -> list[Row]:
    """Return at most that many rows, evenly chosen, with the first and the last."""
    if len(rows) <= at_most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (at_most - 1))] for i in range(at_most)]
