"""What the figures should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What a figure should be.

    Attributes:
        text: the figure in words, with its unit.
        group: of the case.
        case: where the figure is found.
        figure: reads it from the results by name of case.
        bound: at most this much; with `at_least`, at least.
    """

    text: str
    group: str
    case: str
    figure: Callable[[Line], float]
    bound: float
    at_least: bool = False

    def row(self, found: Mapping[tuple[str, str], Line]) -> list[str]:
        """Return the table's row."""
        wanted = f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        line = found.get((self.group, self.case))
        why = "not measured" if line is None else reason(line)
        if line is None or why:
            return [self.text, wanted, "–", why]
        value = self.figure(line)
        ratio = value / self.bound
        is_met = ratio >= 1 if self.at_least else ratio <= 1
        verdict = "met" if is_met else f"**missed**: {ratio:.2f} times the target"
        return [self.text, wanted, f"{value:.4g}", verdict]


def _median(line: Line) -> float:
    return float(line["median_s"])


def _peak_above(model_mib: float) -> Callable[[Line], float]:
    return lambda line: (line["server_peak_mib"] * (1 << 20) - 100e6) / (1 << 20) / model_mib


def _of(name: str) -> Callable[[Line], float]:
    return lambda line: float(line[name])


def _speed(chain: str, what: str, mb_s: float) -> Target:
    def figure(line: Line) -> float:
        return next(float(row[f"{what}_mb_s"]["median"]) for row in line["rows"] if row["name"] == chain)

    return Target(f"{chain}, {what}: MB/s of float32 on one core", "codecs", "Gaussian", figure, mb_s, at_least=True)


TARGETS: Final = (
    Target("1 MiB × 4: seconds a round", "ours", "1 MiB × 4", _median, 0.045),
    Target("32 MiB × 4: seconds a round", "ours", "32 MiB × 4", _median, 0.9),
    Target("128 MiB × 4: seconds a round", "ours", "128 MiB × 4", _median, 4),
    Target("128 MiB × 4: (server's peak memory − 100 MB) / model", "ours", "128 MiB × 4", _peak_above(128), 3),
    Target("128 MiB × 16: the same", "ours", "128 MiB × 16", _peak_above(128), 3),
    Target("512 MiB × 4: the same", "ours", "512 MiB × 4", _peak_above(512), 3),
    Target("512 MiB × 1: seconds a round", "ours", "512 MiB × 1", _median, 6),
    Target("64 KiB × 16: seconds a round", "ours", "64 KiB × 16", _median, 0.025),
    Target("64 KiB × 128: clients a second", "ours", "64 KiB × 128", _of("clients_per_s"), 800, at_least=True),
    Target(
        "64 KiB × 128 in 8 processes: clients a second",
        "ours",
        "64 KiB × 128, 8 processes",
        _of("clients_per_s"),
        800,
        at_least=True,
    ),
    Target(
        "64 KiB updates accepted for a second of a server core",
        "load",
        "64 KiB from 256 connections",
        _of("accepted_per_server_core_s"),
        800,
        at_least=True,
    ),
    Target("1000 idle clients: kB a client", "idle", "1000 clients", _of("kb_per_client"), 86),
    Target("1000 idle clients: memory, times the bare server's", "idle", "1000 clients", _of("times_floor"), 1.1),
    Target("5000 idle clients: kB a client", "idle", "5000 clients", _of("kb_per_client"), 86),
    Target("5000 idle clients: memory, times the bare server's", "idle", "5000 clients", _of("times_floor"), 1.1),
    _speed("top-k 1 %", "encode", 300),
    _speed("FedZip at 1 %", "encode", 80),
    _speed("FedZip at 1 %", "open", 400),
    _speed("FedZip at 1 %", "decode", 400),
    _speed("int8", "encode", 400),
    _speed("int8", "open", 800),
    _speed("int8", "decode", 800),
    _speed("RQM", "encode", 60),
    _speed("sign", "encode", 800),
)


def reason(line: Line) -> str:
    """Return why a case has no figures; empty if it has."""
    return next((f"{why}: {line[why]}" for why in ("skipped", "failed") if why in line), "")
