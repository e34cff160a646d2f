"""A picture of a plan: epsilon over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedprivacy.planning import Point
from fedserver.export.plot import new_figure, png_of
from fedserver.state.failures import storage_errors

_BLUE: Final = "#0072B2"
_ORANGE: Final = "#D55E00"


def plot_epsilon(points: Sequence[Point], delta: float, budget: float | None, path: Path, unit: str) -> None:
    """Write a PNG of epsilon over steps or rounds, by both accountants, and of the budget if there is one.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageFailed: the file cannot be written.
    """
    figure = new_figure(3.2)
    panel = figure.subplots()
    steps = [point.steps for point in points]
    panel.plot(steps, [point.epsilon for point in points], color=_BLUE, linewidth=1.6, label="the smaller bound")
    panel.plot(
        steps, [point.epsilon_rdp for point in points], color=_ORANGE, linewidth=1.2, linestyle="--", label="RDP"
    )
    if budget is not None:
        panel.axhline(budget, color="black", linewidth=0.8, linestyle=":", label="budget")
    panel.set_ylim(bottom=0)
    panel.set_xlabel(unit)
    panel.set_ylabel("epsilon")
    last = points[-1]
    panel.set_title(f"epsilon {last.epsilon:.3g} after {last.steps:,} {unit}, delta {delta:g}", loc="left", fontsize=9)
    panel.legend(fontsize=8, frameon=False)
    data = png_of(figure)
    with storage_errors(f"write {path}"):
        path.write_bytes(data)
