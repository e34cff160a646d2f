"""A picture of a job's rounds. Needs matplotlib, which is an extra: nothing here imports it before it is used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedcore.errors import ConfigError
from fedserver.export.figures import Row, evaluated, metric_names
from fedserver.state.failures import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_MISSING: Final = "no plot: matplotlib is not installed (pip install 'roundtable[plot]')"

_BLUE: Final = "#0072B2"
_ORANGE: Final = "#D55E00"
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def plotting_installed() -> bool:
    """Return whether there can be plots."""
    return find_spec("matplotlib") is not None


def plot_history(history: Sequence[Row], path: Path) -> None:
    """Write a PNG of a history (`fedserver.status.history_of`): up to two metrics, and bytes, by version.

    Raises:
        ConfigError: matplotlib is not installed.
        StorageFailed: the file cannot be written.
    """
    data = plot_png(history)
    with storage_errors(f"write {path}"):
        path.write_bytes(data)


def plot_png(history: Sequence[Row]) -> bytes:
    """Return what `plot_history` writes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    metrics = metric_names(history, at_most=2)
    figure = new_figure(1 + 2.1 * (len(metrics) + 1))
    panels = list(figure.subplots(len(metrics) + 1, 1, sharex=True, squeeze=False)[:, 0])
    for panel, metric in zip(panels, metrics, strict=False):
        _draw_metric(panel, history, metric)
    _draw_bytes(panels[-1], history)
    panels[-1].set_xlabel("version (rounds done)")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    return png_of(figure)


def new_figure(height: float) -> Figure:
    """Return an empty figure of this height in inches, as wide as all of ours.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not plotting_installed():
        raise ConfigError(PLOT_MISSING)
    # Not pyplot: it keeps figures in global state, and picks a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), dpi=130, layout="constrained")


def png_of(figure: Figure) -> bytes:
    """Return a figure, its panels dressed as all of ours, as a PNG: the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for panel in figure.axes:
        panel.grid(visible=True, color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _draw_metric(panel: Axes, history: Sequence[Row], metric: str) -> None:
    points = [(row["version"], row["evaluation"][metric]) for row in evaluated(history) if metric in row["evaluation"]]
    versions, values = zip(*points, strict=True)
    panel.plot(versions, values, color=_BLUE, linewidth=1.6, marker="o" if len(points) <= 60 else "", markersize=3)
    panel.set_ylabel(metric, parse_math=False)
    panel.set_title(
        f"{metric}: {values[0]:.3g} at version {versions[0]}, {values[-1]:.3g} at version {versions[-1]}",
        loc="left",
        fontsize=9,
        parse_math=False,
    )
    if metric == "accuracy" and all(0 <= value <= 1 for value in values):
        panel.set_ylim(0, 1)


def _draw_bytes(panel: Axes, history: Sequence[Row]) -> None:
    largest = max((max(row["uplink_bytes"], row["downlink_bytes"]) for row in history), default=0)
    divisor, unit = next((u for u in _UNITS if largest >= u[0]), _UNITS[-1])
    versions = [row["version"] for row in history]
    # Down is often exactly as much as up: the broken line on top lets both be seen.
    for key, label, color, style in (
        ("uplink_bytes", "up: clients to server", _BLUE, "-"),
        ("downlink_bytes", "down: server to clients", _ORANGE, (0, (3, 3))),
    ):
        values = [row[key] / divisor for row in history]
        panel.step(versions, values, where="mid", label=label, color=color, linestyle=style, linewidth=1.6)
    panel.set_ylim(bottom=0, top=max(1.0, 1.3 * largest / divisor))
    panel.set_ylabel(f"{unit} per version")
    up, down = (sum(row[key] for row in history) / 1e6 for key in ("uplink_bytes", "downlink_bytes"))
    panel.set_title(f"traffic: {up:,.2f} MB up, {down:,.2f} MB down in all", loc="left", fontsize=9)
    panel.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)
