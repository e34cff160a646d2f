"""The demo's last words."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedserver.cli.text import size_text
from fedsim.summary import Summary

_BAR_WIDTH = 30


def print_summary(summary: Summary, folder: Path, took_s: float, console: Console, codec: str | None) -> None:
    """Print what came out, and where it lies; `codec` is the preset that was asked for."""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("base network", summary.base_accuracy),
        (f"federated adapter, {summary.rounds} rounds", summary.final_accuracy),
        ("adapter of all data in one place", summary.pooled_accuracy),
    ):
        if value is not None:
            table.add_row(Text(name), Text(f"{value:.1%}", style="bold"), ProgressBar(1.0, value, width=_BAR_WIDTH))
    console.print()
    console.print("Accuracy on the clients' held-out data", style="bold")
    console.print(table)
    if (closed := _share_closed(summary)) is not None:
        console.print(f"{closed:.0%} of the gap closed, while the data stayed with the clients", style="green")
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_row("sent", f"{size_text(summary.uplink_bytes)} up, {size_text(summary.downlink_bytes)} down")
    if codec is not None:
        error = summary.relative_error
        lost = "" if not error else f", relative error of an update {error:.2g}"
        facts.add_row("codec", f"{codec}: {summary.ratio:.3g} × fewer bytes up than raw values{lost}")
    facts.add_row("adapter", _shown(summary.adapter))
    facts.add_row("model card", _shown(summary.model_card))
    facts.add_row("plot", "none: matplotlib is not installed" if summary.plot is None else _shown(summary.plot))
    facts.add_row("these figures", _shown(folder / "summary.json"))
    facts.add_row("logs", _shown(folder / "logs"))
    facts.add_row("took", f"{took_s:.0f} s; every process has ended")
    console.print(facts)


def _share_closed(summary: Summary) -> float | None:
    base, final, pooled = summary.base_accuracy, summary.final_accuracy, summary.pooled_accuracy
    if base is None or final is None or pooled is None or pooled <= base:
        return None
    return (final - base) / (pooled - base)


def _shown(path: str | Path) -> str:
    """Return a path as seen from here, if it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
