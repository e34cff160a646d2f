"""A bar while something large crosses the wire."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error within the block, if that is a terminal; the block is told how to move it."""
    if not sys.stderr.isatty():
        yield lambda total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=num_bytes)
        yield lambda total: shown.update(task, completed=total)
