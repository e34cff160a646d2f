"""Writes RESULTS.md from the raw figures of a run: `python -m benchmarks.report`.

Every figure comes from `results.jsonl`; the words of explanation from `comments.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.suite import HERE, RESULTS

COMMENTS: Final = HERE / "comments.md"
REPORT: Final = HERE / "RESULTS.md"
PEERS: Final = {"legacy": "Flower, gRPC, no TLS", "runtime": "Flower runtime, HTTP, no TLS"}

ROUNDS: Final = (
    "Seconds a round: median (smallest to largest), the first round left out. The ratio is Flower's seconds over ours."
)
COSTS: Final = (
    "Processor milliseconds for one client's download and update; peak memory of the server, all its processes; "
    "bytes on loopback over the bytes of the models that had to move (what else uses loopback counts too)."
)

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
        if line is None or (reason := _reason(line)):
            return [self.text, wanted, "–", "not measured" if line is None else reason]
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
)


def render(lines: Sequence[Line], comments: str) -> str:
    """Return the report's text.

    Args:
        lines: of `results.jsonl`, the machine first.
        comments: Markdown, put below the figures as it is.
    """
    about, cases = lines[0], lines[1:]
    found = {(line["group"], line["case"]): line for line in cases}
    parts = [
        "# Results",
        "Made by `make bench` from [results.jsonl](results.jsonl); what is measured and how: [README.md](README.md).",
        _machine(about, cases),
        "## Targets",
        _table(["figure", "target", "found", ""], [target.row(found) for target in TARGETS]),
        _memory_law(found),
        "## Rounds, ours and Flower's",
        f"Flower {about['flower']}, measured in this same run. {ROUNDS}",
        _rounds(found),
        "## What a round costs",
        COSTS,
        _costs(cases),
        "## Load",
        _load(cases),
        "## Idle clients",
        _idle(cases),
        "## Where the server's time goes",
        _breakdowns(cases),
        comments.strip(),
        "## Commands",
        _commands(cases),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(about: Line, cases: Iterable[Line]) -> str:
    loads = [line["load_before"] for line in cases if "load_before" in line]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    rows = [
        ["date", about["date"]],
        ["processor", f"{about['cpu']}, {about['cores']} cores: servers and clients share them"],
        ["memory", f"{about['memory_gib']} GiB"],
        ["kernel", about["kernel"]],
        ["versions", f"commit {about['commit']}; Python {about['python']}, {about['openssl']}, {packages}"],
        ["load average before the cases", f"{min(loads)} to {max(loads)}" if loads else "–"],
    ]
    return _table(["", ""], rows)


def _memory_law(found: Mapping[tuple[str, str], Line]) -> str:
    few, many = (found.get(("ours", f"128 MiB × {clients}"), {}) for clients in (4, 16))
    if "server_peak_mib" not in few or "server_peak_mib" not in many:
        return ""
    few_mib, many_mib = few["server_peak_mib"], many["server_peak_mib"]
    change = 100 * (many_mib / few_mib - 1)
    verdict = "met" if abs(change) <= 5 else "**missed**"
    return (
        f"The server's peak memory must not depend on the number of clients: {few_mib:.0f} MiB with 4 of 128 MiB, "
        f"{many_mib:.0f} MiB with 16, {change:+.1f} % (target ±5 %: {verdict})."
    )


def _rounds(found: Mapping[tuple[str, str], Line]) -> str:
    rows = []
    for (group, case), ours in found.items():
        if group != "ours":
            continue
        row = [case, _seconds(ours)]
        for peer in PEERS:
            theirs = found.get((peer, case))
            row += [_seconds(theirs), _ratio(theirs, ours)]
        rows.append(row)
    header = ["model × clients", "ours, mutual TLS, durable"]
    for name in PEERS.values():
        header += [name, "ratio"]
    return _table(header, rows)


def _costs(cases: Iterable[Line]) -> str:
    rows = [
        [
            line["case"],
            PEERS.get(line["group"], line["group"]),
            f"{line['clients_per_s']:g}",
            f"{line['server_cpu_ms_per_update']:g}",
            f"{line['clients_cpu_ms_per_update']:g}",
            f"{line['server_peak_mib']:.0f}",
            f"{line['times_ideal_bytes']:g}",
            f"{line['load_before']:g}",
        ]
        for line in cases
        if "median_s" in line
    ]
    header = ["model × clients", "", "clients/s", "server ms", "client ms", "server peak MiB", "× ideal bytes", "load"]
    return _table(header, rows)


def _load(cases: Iterable[Line]) -> str:
    rows = [
        [
            line["case"],
            f"{line['accepted']}",
            f"**{line['accepted_per_server_core_s']}**",
            f"{line['accepted_per_s']}",
            f"{line['server_cpu_s']:g}",
            f"{line['clients_cpu_s']:g}",
            f"{line['server_peak_mib']:.0f}",
        ]
        for line in cases
        if line["group"] == "load" and not _reason(line)
    ]
    return _table(
        ["", "accepted", "a server-core-second", "a second", "server CPU s", "generator CPU s", "server peak MiB"], rows
    )


def _idle(cases: Iterable[Line]) -> str:
    rows = []
    for line in cases:
        if line["group"] == "idle" and not _reason(line):
            for who, prefix in (("ours", ""), ("bare grpc.aio server", "floor_")):
                figures = [line[prefix + name] for name in ("kb_per_client", "idle_cpu_percent", "connect_s")]
                memory = f"{line[prefix + 'before_mib']:.0f} → {line[prefix + 'after_mib']:.0f}"
                rows.append([line["case"], who, memory, *(f"{figure:g}" for figure in figures)])
    return _table(["", "", "server MiB", "kB a client", "idle CPU %", "s to connect all"], rows)


def _breakdowns(cases: Iterable[Line]) -> str:
    parts = []
    for line in cases:
        if line["group"] != "breakdown" or _reason(line):
            continue
        total_ms = line["cpu_ms"]
        rows = [
            [
                row,
                f"{cpu_ms:.1f}",
                f"{100 * cpu_ms / total_ms:.0f} %",
                f"{line['rows_wall_ms'][row]:.1f}" if row in line["rows_wall_ms"] else "",
                f"{line['rows_calls'][row]:g}" if row in line["rows_calls"] else "",
                _measured(row),
            ]
            for row, cpu_ms in line["rows_cpu_ms"].items()
        ]
        threads = ", ".join(f"{name} {value:g}" for name, value in line["threads_cpu_ms"].items())
        parts.append(f"### {line['case']}")
        parts.append(
            f"A round with clocks in the server took {line['wall_ms']:g} ms, and {total_ms:g} ms of the server's"
            f" processor time; by thread: {threads}."
        )
        parts.append(_table(["", "CPU ms", "", "wall ms, all threads", "calls", "measured by"], rows))
    return "\n\n".join(parts)


def _measured(row: str) -> str:
    match row:
        case "wire":
            return "bare server, same bytes, no TLS"
        case "TLS":
            return "bare server with mutual TLS, less the row above"
        case "everything else":
            return "the rest of the process's time"
        case _:
            return "clocks around the functions"


def _commands(cases: Iterable[Line]) -> str:
    return "```\n" + "\n".join(f"{line['command']}" for line in cases) + "\n```"


def _seconds(line: Line | None) -> str:
    if line is None:
        return "–"
    return _reason(line) or f"{line['median_s']:.3g} ({line['min_s']:.3g} to {line['max_s']:.3g})"


def _ratio(theirs: Line | None, ours: Line) -> str:
    if theirs is None or _reason(theirs) or _reason(ours):
        return ""
    return f"{theirs['median_s'] / ours['median_s']:.2g}×"


def _reason(line: Line) -> str:
    """Return why a case has no figures; empty if it has."""
    return next((f"{why}: {line[why]}" for why in ("skipped", "failed") if why in line), "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Read the results and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args()
    text = options.results.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    options.out.write_text(render(lines, COMMENTS.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"wrote {options.out}\n")


if __name__ == "__main__":
    main()
