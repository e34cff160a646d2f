from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.codecs import CHAINS
from benchmarks.rounds import times
from benchmarks.suite import CASES, HERE, RESULTS, without
from benchmarks.targets import TARGETS

MACHINE: dict[str, Any] = {
    "group": "machine",
    "date": "2026-01-01 00:00 UTC",
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 16,
    "kernel": "Linux 6",
    "python": "3.11",
    "openssl": "OpenSSL 3",
    "packages": {"grpcio": "1"},
    "commit": "abc",
    "flower": "1",
}
COST: dict[str, Any] = {
    "min_s": 0.04,
    "max_s": 0.06,
    "clients_per_s": 80.0,
    "server_peak_mib": 484.0,
    "server_cpu_ms_per_update": 2.0,
    "clients_cpu_ms_per_update": 3.0,
    "times_ideal_bytes": 1.0,
    "load_before": 0.5,
    "command": "python -m benchmarks.rounds",
}


def row(text: str, start: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return found


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    text = report.render(lines, report.COMMENTS.read_text(encoding="utf-8"))
    assert text == report.REPORT.read_text(encoding="utf-8"), "run `python -m benchmarks.report`"


def test_a_missed_target_says_by_how_much() -> None:
    lines = [MACHINE, {"group": "ours", "case": "1 MiB × 4", "median_s": 0.054, **COST}]
    found = row(report.render(lines, ""), "1 MiB × 4: seconds a round")
    assert "0.054" in found
    assert "**missed**: 1.20 times the target" in found


def test_a_target_that_is_met_and_one_that_was_not_measured() -> None:
    text = report.render([MACHINE, {"group": "ours", "case": "1 MiB × 4", "median_s": 0.045, **COST}], "")
    assert row(text, "1 MiB × 4: seconds a round").endswith("| met |")
    assert row(text, "32 MiB × 4: seconds a round").endswith("| not measured |")


def test_peers_stand_beside_ours_with_their_ratio_or_the_reason_for_none() -> None:
    lines = [
        MACHINE,
        {"group": "ours", "case": "1 MiB × 4", "median_s": 0.05, **COST},
        {"group": "legacy", "case": "1 MiB × 4", "median_s": 0.1, **COST},
        {"group": "runtime", "case": "1 MiB × 4", "skipped": "needs about 3 GiB", "command": "c"},
    ]
    found = row(
        report.render(lines, "").partition("## Rounds")[2].partition("##")[0], "1 MiB × 4 | 0.05 (0.04 to 0.06)"
    )
    assert "| 2× |" in found
    assert "skipped: needs about 3 GiB" in found


def test_a_group_measured_later_takes_the_place_of_its_lines_and_no_others() -> None:
    later = {**MACHINE, "commit": "def"}
    ours, idle, load = ({"group": group, "case": "c"} for group in ("ours", "idle", "load"))
    assert without([MACHINE, ours, idle, later, load], {"load"}) == [MACHINE, ours, idle]
    assert without([MACHINE, ours, later, load], {"ours"}) == [later, load]
    assert without([MACHINE, ours, later, load], {"idle"}) == [MACHINE, ours, later, load]
    assert without([MACHINE, ours, idle], {"ours", "idle"}) == []


def test_each_run_has_its_machine_in_a_column() -> None:
    later = {**MACHINE, "commit": "def"}
    del later["flower"]
    codecs = {"group": "codecs", "case": "Gaussian", "failed": "it did", "command": "c", "load_before": 3.5}
    text = report.render([MACHINE, {"group": "ours", "case": "1 MiB × 4", "median_s": 0.05, **COST}, later, codecs], "")
    assert "|  | ours | codecs |" in text
    assert "Flower 1;" in text
    versions = row(text, "versions")
    assert versions.index("commit abc") < versions.index("commit def")
    assert row(text, "load average before the cases").endswith("| 0.5 to 0.5 | 3.5 to 3.5 |")
    assert row(text, "int8, encode: MB/s of float32 on one core").endswith("| failed: it did |")


def test_a_speed_is_held_to_its_median() -> None:
    rate = {"median": 200, "min": 1, "max": 9000}
    figures = {"bytes": 1, "ratio": 4, "error": 0.25, "small_bytes": {"10": 17}}
    rates = {"encode_mb_s": rate, "open_mb_s": {**rate, "median": 1e6}, "decode_mb_s": rate}
    line = {"group": "codecs", "case": "Gaussian", "values": 1, "tensors": 1, "repeats": 1, "core_share": 1.0}
    line |= {"rows": [{"name": name, **figures, **rates} for name in CHAINS], "command": "c", "load_before": 0.0}
    text = report.render([MACHINE, line], "")
    assert "**missed**: 0.50 times the target" in row(text, "int8, encode: MB/s of float32 on one core")
    assert row(text, "int8 | 200 (1 to 9000)").endswith("| > 100000 | 200 (1 to 9000) | 1 | 4 | 0.25 | 17 |")


def test_memory_must_not_grow_with_clients() -> None:
    lines: list[dict[str, Any]] = [MACHINE]
    for clients, peak_mib in ((4, 400.0), (16, 440.0)):
        lines.append(
            {"group": "ours", "case": f"128 MiB × {clients}", "median_s": 2, **COST, "server_peak_mib": peak_mib}
        )
    assert "+10.0 % (target ±5 %: **missed**)" in report.render(lines, "")


def test_the_first_round_is_not_timed() -> None:
    assert times([0.0, 10.0, 11.0, 13.0, 14.0], 4) == {
        "median_s": 1.0,
        "min_s": 1.0,
        "max_s": 2.0,
        "clients_per_s": 4.0,
    }


def test_every_target_names_a_case_of_the_suite() -> None:
    cases = {(case.group, case.name) for case in CASES}
    assert [target.text for target in TARGETS if (target.group, target.case) not in cases] == []


def test_every_file_is_in_the_readme() -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    found = [path for path in HERE.rglob("*.py") if path.name != "__init__.py" and ".venv-flower" not in path.parts]
    modules = [path.relative_to(HERE) for path in found]
    assert [str(Path(module)) for module in modules if f"`{module}`" not in text] == []
