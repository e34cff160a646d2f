"""Writes RESULTS.md from the raw figures of a run: `python -m benchmarks.report`.

Every figure comes from `results.jsonl`; the words of explanation from `comments.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.suite import HERE, RESULTS
from benchmarks.targets import TARGETS, Line, reason

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

CODECS: Final = (
    "MB of float32 a second of processor time, on one core: median (smallest to largest). *Open* is decoding as the"
    " server does it, each part once and none kept; where codes have a book of their values (as of sign, RQM and"
    " k-means) a part holds codes, and no value is looked up. *Decode* gives one vector of values. Ratio and error (L2,"
    " over that of the values) are those of the whole frame: a ratio says little without its error. The last columns"
    " are the frames of a single small tensor. The stages are in"
    " [fedcodec](../compression/fedcodec/README.md#measured)."
)
FOLDING: Final = (
    "Seconds of processor time on one core, median (smallest to largest), to decode and fold {updates} updates of"
    " {values:,} values: part by part as they are decoded, and each as one dense vector. Memory is the peak of what"
    " comes on top of the sum and the frames."
)
FASTEST_MB_S: Final = 100_000
"""What is faster looks at no values, or at hardly any."""


def render(lines: Sequence[Line], comments: str) -> str:
    """Return the report's text.

    Args:
        lines: of `results.jsonl`, each machine before what was measured on it.
        comments: Markdown, put below the figures as it is.
    """
    cases = [line for line in lines if line["group"] != "machine"]
    flower = next((line["flower"] for line in lines if "flower" in line), "not measured")
    found = {(line["group"], line["case"]): line for line in cases}
    parts = [
        "# Results",
        "Made by `make bench` from [results.jsonl](results.jsonl); what is measured and how: [README.md](README.md).",
        _machines(lines),
        "## Targets",
        _table(["figure", "target", "found", ""], [target.row(found) for target in TARGETS]),
        _memory_law(found),
        "## Rounds, ours and Flower's",
        f"Flower {flower}; what one run measured stands in one column above. {ROUNDS}",
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
        "## Codecs",
        CODECS,
        _codecs(cases),
        "## Folding",
        _folding(cases),
        comments.strip(),
        "## Commands",
        _commands(cases),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machines(lines: Sequence[Line]) -> str:
    """Return a column for each run: what was measured later stands behind a machine of its own."""
    starts = [number for number, line in enumerate(lines) if line["group"] == "machine"]
    runs = [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    rows = zip(*(_machine(about, cases) for about, *cases in runs), strict=True)
    names = ["", "date", "processor", "memory", "kernel", "versions", "load average before the cases"]
    header, *table = ([name, *row] for name, row in zip(names, rows, strict=True))
    return _table(header, table)


def _machine(about: Line, cases: Sequence[Line]) -> list[str]:
    loads = [line["load_before"] for line in cases if "load_before" in line]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return [
        ", ".join(dict.fromkeys(line["group"] for line in cases)),
        about["date"],
        f"{about['cpu']}, {about['cores']} cores: servers and clients share them",
        f"{about['memory_gib']} GiB",
        about["kernel"],
        f"commit {about['commit']}; Python {about['python']}, {about['openssl']}, {packages}",
        f"{min(loads)} to {max(loads)}" if loads else "–",
    ]


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
        if line["group"] == "load" and not reason(line)
    ]
    return _table(
        ["", "accepted", "a server-core-second", "a second", "server CPU s", "generator CPU s", "server peak MiB"], rows
    )


def _idle(cases: Iterable[Line]) -> str:
    rows = []
    for line in cases:
        if line["group"] == "idle" and not reason(line):
            for who, prefix in (("ours", ""), ("bare grpc.aio server", "floor_")):
                figures = [line[prefix + name] for name in ("kb_per_client", "idle_cpu_percent", "connect_s")]
                memory = f"{line[prefix + 'before_mib']:.0f} → {line[prefix + 'after_mib']:.0f}"
                rows.append([line["case"], who, memory, *(f"{figure:g}" for figure in figures)])
    return _table(["", "", "server MiB", "kB a client", "idle CPU %", "s to connect all"], rows)


def _breakdowns(cases: Iterable[Line]) -> str:
    parts = []
    for line in cases:
        if line["group"] != "breakdown" or reason(line):
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


def _codecs(cases: Iterable[Line]) -> str:
    parts = []
    for line in cases:
        if line["group"] != "codecs" or reason(line):
            continue
        rows = [
            [
                row["name"],
                *(_rate(row[f"{what}_mb_s"]) for what in ("encode", "open", "decode")),
                f"{row['bytes']:,}",
                f"{row['ratio']:.4g}",
                f"{row['error']:.3g}",
                *(f"{size}" for size in row["small_bytes"].values()),
            ]
            for row in line["rows"]
        ]
        small = [f"{size} values, bytes" for size in line["rows"][0]["small_bytes"]]
        parts.append(f"### {line['case']}")
        parts.append(
            f"{line['values']:,} values in {line['tensors']} tensors, {line['repeats']} rounds; the process had"
            f" {100 * line['core_share']:.0f} % of its core."
        )
        parts.append(_table(["", "encode", "open", "decode", "bytes", "ratio", "error", *small], rows))
    return "\n\n".join(parts)


def _rate(mb_s: Mapping[str, float]) -> str:
    return f"> {FASTEST_MB_S}" if mb_s["median"] > FASTEST_MB_S else _spread(mb_s, ".0f")


def _spread(found: Mapping[str, float], form: str) -> str:
    return f"{found['median']:{form}} ({found['min']:{form}} to {found['max']:{form}})"


def _folding(cases: Iterable[Line]) -> str:
    parts = []
    for line in cases:
        if line["group"] != "folding" or reason(line):
            continue
        rows = [
            [
                row["name"],
                f"{row['frame_bytes']:,}",
                _spread(row["parts_s"], ".3g"),
                _spread(row["dense_s"], ".3g"),
                f"{row['dense_s']['median'] / row['parts_s']['median']:.2g}×",
                f"{row['parts_mib']:.1f}",
                f"{row['dense_mib']:.1f}",
            ]
            for row in line["rows"]
        ]
        header = ["", "bytes of a frame", "parts, s", "dense, s", "ratio", "parts, MiB", "dense, MiB"]
        parts += [FOLDING.format(**line), _table(header, rows)]
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
    return reason(line) or f"{line['median_s']:.3g} ({line['min_s']:.3g} to {line['max_s']:.3g})"


def _ratio(theirs: Line | None, ours: Line) -> str:
    if theirs is None or reason(theirs) or reason(ours):
        return ""
    return f"{theirs['median_s'] / ours['median_s']:.2g}×"


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
