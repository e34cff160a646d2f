"""Figures and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from fedcore.errors import InvalidInput

# Names and reasons come from peers too: none may start a line of its own or steer a terminal.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_DURATION: Final = re.compile(r"([0-9]{1,9})(s|m|h|d|)")
_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def printable(text: object) -> str:
    """Return `text` as one line without control characters."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), str(text))


def size_text(num_bytes: int) -> str:
    """Return a number of bytes in decimal units: ``"2.31 MB"``."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.3g} {unit}"


def duration_text(seconds: float) -> str:
    """Return a duration: ``"0.4 s"``, ``"42 s"``, ``"3 min 20 s"``, ``"2 h 05 min"``, ``"3 d 4 h"``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def parse_duration(text: str) -> int:
    """Return the seconds in ``"90"``, ``"90s"``, ``"15m"``, ``"1h"`` or ``"7d"``.

    Raises:
        InvalidInput: it is none of these.
    """
    if (found := _DURATION.fullmatch(text)) is None:
        raise InvalidInput(f"{text[:40]!r} is not a duration: write a whole number and s, m, h or d, such as 90s or 1h")
    return int(found[1]) * _UNITS_S[found[2]]


def time_text(seconds: float) -> str:
    """Return a point in time (seconds since 1970) in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def figures_text(evaluated: dict[str, Any] | None) -> str:
    """Return a version's evaluation: ``"accuracy 0.713, loss 0.912 (version 11, 360 examples)"``; empty without one."""
    if not evaluated or not evaluated["evaluation"]:
        return ""
    figures = dict(evaluated["evaluation"])
    examples = figures.pop("num_examples", None)
    shown = ", ".join(f"{printable(name)} {value:.4g}" for name, value in figures.items())
    where = f"version {evaluated['version']}" + ("" if examples is None else f", {examples:.0f} examples")
    return f"{shown} ({where})"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the first one the heading, as lines with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
