"""Figures of a version from what its clients say."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedcore.messages import UpdateHeader


def evaluation_of(headers: Iterable[UpdateHeader]) -> dict[str, float]:
    """Return each metric's mean over clients, weighted by held-out examples, and their total as ``num_examples``.

    The sums are exact (`math.fsum`), so the order in which updates came does not matter. A metric that only some
    clients report is averaged over those. No client measured anything: an empty dict.
    """
    measured = [header for header in headers if header.evaluated_examples > 0 and header.evaluation]
    figures: dict[str, float] = {}
    for name in sorted({name for header in measured for name in header.evaluation}):
        rows = [
            (header.evaluation[name], header.evaluated_examples) for header in measured if name in header.evaluation
        ]
        figures[name] = math.fsum(value * count for value, count in rows) / sum(count for _, count in rows)
    if figures:
        figures["num_examples"] = float(sum(header.evaluated_examples for header in measured))
    return figures


def mean_encoding_error(headers: Iterable[UpdateHeader]) -> float | None:
    """Return the mean over the updates that name their error, in whatever order they came; None if none does."""
    errors = [header.encoding_error for header in headers if header.encoding_error is not None]
    return math.fsum(errors) / len(errors) if errors else None
