"""Jobs beside each other: a table, and a picture of what their bytes bought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fedcore.errors import InvalidInput
from fedcore.jobfile import Job, load_job, parse_job
from fedserver.cli.text import columns, size_text
from fedserver.export.figures import Row, metric_names
from fedserver.export.plot import new_figure, plotting_installed, png_of
from fedserver.rounds.plan import make_plan
from fedserver.state.failures import storage_errors
from fedsim.summary import Summary

PLOT_FILE: Final = "comparison.png"

# Okabe and Ito's colours, which nearly everybody can tell apart.
_COLOURS: Final = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES: Final = ("-", "--", ":")


@dataclass(frozen=True)
class Run:
    """A job that was run once.

    Attributes:
        job: its name.
        history: a row for each version, the oldest first (docs/status.md).
    """

    job: str
    seed: int
    summary: Summary
    history: Sequence[Row]

    def as_json(self) -> dict[str, Any]:
        """Return job, seed and summary as plain JSON values."""
        return {"job": self.job, "seed": self.seed, **self.summary.as_json()}


def load_jobs(paths: Sequence[Path], num_seeds: int = 1) -> list[Job]:
    """Read job files, and return each job with its own seed and the `num_seeds` - 1 after it.

    Raises:
        JobFileError: a file is wrong, or its job could not be run.
        InvalidInput: two jobs have one name.
    """
    files: dict[str, Path] = {}
    jobs = []
    for path in paths:
        job = load_job(path)
        name = job.job.name
        if name in files:
            raise InvalidInput(f"{path}: the job in {files[name]} is named {name!r} too")
        files[name] = path
        tree = make_plan(job, str(path)).job.model_dump(mode="json")
        for seed in range(job.job.seed, job.job.seed + num_seeds):
            jobs.append(parse_job({**tree, "job": {**tree["job"], "seed": seed}}, str(path)))
    return jobs


def table(runs: Sequence[Run]) -> list[str]:
    """Return a heading and a line for each job: means over its runs, and the range of accuracy and loss."""
    rows = [("job", "rounds", "accuracy", "loss", "up, a round", "up", "down", "raw : up", "error", "epsilon")]
    for job, group in _by_job(runs).items():
        of = [run.summary for run in group]
        errors = [summary.relative_error for summary in of if summary.relative_error is not None]
        rows.append(
            (
                job,
                str(of[0].rounds),
                _spread_text([summary.final_accuracy for summary in of], ".1%"),
                _spread_text([summary.final_loss for summary in of], ".4g"),
                size_text(round(fmean(summary.round_uplink_bytes for summary in of))),
                size_text(round(fmean(summary.uplink_bytes for summary in of))),
                size_text(round(fmean(summary.downlink_bytes for summary in of))),
                f"{fmean(summary.ratio for summary in of):.3g}",
                f"{fmean(errors):.3g}" if errors else "-",
                _spread_text([summary.epsilon for summary in of], ".3g"),
            )
        )
    return columns(rows)


def write_plot(runs: Sequence[Run], folder: Path) -> Path | None:
    """Write `plot_png` into a folder; return None where there are no runs, or matplotlib is not installed.

    Raises:
        StorageFailed: the file cannot be written.
    """
    if not runs or not plotting_installed():
        return None
    path = folder / PLOT_FILE
    data = plot_png(runs)
    with storage_errors(f"write {path}"):
        path.write_bytes(data)
    return path


def plot_png(runs: Sequence[Run]) -> bytes:
    """Return a PNG of accuracy (without one, the first metric) against bytes up and down so far: a colour for each job.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    metric = next(iter(metric_names([row for run in runs for row in run.history], at_most=1)), "accuracy")
    figure = new_figure(4.2)
    panel = figure.subplots()
    panel.set_xscale("log")
    for number, (job, group) in enumerate(_by_job(runs).items()):
        for run in group:
            points = curve(run.history, metric)
            panel.plot(
                [num_bytes for num_bytes, _ in points],
                [value for _, value in points],
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_STYLES[number // len(_COLOURS) % len(_STYLES)],
                linewidth=1.4,
                label=job if run is group[0] else None,
            )
    panel.set_xlabel("bytes up and down so far, all clients")
    panel.set_ylabel(metric, parse_math=False)
    panel.legend(loc="best", fontsize=8, frameon=False)
    return png_of(figure)


def curve(history: Sequence[Row], metric: str) -> list[tuple[int, float]]:
    """Return for each version that was measured the bytes, up and down, of the job until then, and the metric."""
    spent = accumulate(row["uplink_bytes"] + row["downlink_bytes"] for row in history)
    return [
        (num_bytes, row["evaluation"][metric])
        for num_bytes, row in zip(spent, history, strict=True)
        if metric in row["evaluation"]
    ]


def _by_job(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.job, []).append(run)
    return found


def _spread_text(measured: Sequence[float | None], form: str) -> str:
    values = [value for value in measured if value is not None]
    if not values:
        return "-"
    mean = format(fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
