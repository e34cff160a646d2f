"""Write docs/compatibility.md: which parts of a job go together. `--check` says whether it is current.

Nothing here knows what fits: each cell is a job that is put together and either accepted or refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final

from fedcodec import CODECS, build_pipeline
from fedcodec.base import KINDS
from fedcodec.presets import PRESETS
from fedcore.errors import InvalidInput, JobFileError
from fedcore.jobfile import parse_job
from fedserver.rounds.plan import make_plan

TARGET: Final = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"

Stages = tuple[str, ...]

HELPERS: Final = ("clip", "top-k", "int8")
"""What may stand beside stages of which one makes no sense by itself."""

ORDER: Final = "-"
"""Refused since the second stage is a step that comes before the first one's, or the same step."""

JOBS: Final[Mapping[str, Mapping[str, Any]]] = {
    "uplink, weights from 1 to 1000": {"side": "uplink", "max_examples": 1000},
    "uplink, equal weights": {"side": "uplink", "max_examples": 1},
    "uplink with error feedback": {"side": "uplink", "max_examples": 1, "error_feedback": True},
    "uplink, over-selection": {"side": "uplink", "max_examples": 1, "over_select": 2.0},
    "downlink": {"side": "downlink", "max_examples": 1},
}
"""Columns of the second table."""

HEAD: Final = """# What goes with what

Which stages of a pipeline go together, and with what else in a job. Each cell is a job that was put together and
checked as `fedserver submit` and `fedserver check` do. `·` is accepted; a refusal is one sentence, below the table.
`python scripts/generate_compatibility.py` writes this page.
"""
PAIRS: Final = """## Two stages

The stage of a row, and after it that of a column, each with its defaults. `·`: there is a pipeline that has both,
perhaps with `clip`, `top-k` or `int8` beside them. `-`: the second one is a step that comes before the first one's,
or the same step, and the refusal says so.
"""
REST: Final = """## A stage and the rest of the job

A synchronous schedule, the rule `weighted-mean`, and the shortest pipeline that has the stage. Weights go up to
`aggregator.max_examples`.
"""


def place(stage: str) -> int:
    """Return which step a stage is."""
    return KINDS.index(CODECS.get(stage).kind)


def stages_in_order() -> list[str]:
    """Return every codec of ours, in the order of encoding."""
    ours = [name for name in CODECS.names() if CODECS.get(name).__module__.startswith("fedcodec.")]
    return sorted(ours, key=lambda name: (place(name), CODECS.get(name).wire_id))


def shortest(*stages: str) -> Stages:
    """Return the shortest pipeline that has these stages, in this order, each with its defaults.

    Raises:
        InvalidInput: there is none; why not without any other stage.
    """
    refusal: InvalidInput | None = None
    for number in range(len(HELPERS) + 1):
        for helpers in combinations(HELPERS, number):
            found = stages if refusal is None else tuple(sorted({*stages, *helpers}, key=place))
            try:
                build_pipeline([{"codec": name} for name in found])
                return found
            except InvalidInput as error:
                refusal = refusal or error
                if place(stages[0]) >= place(stages[-1]) and len(stages) > 1:
                    raise
    assert refusal is not None
    raise refusal


def variants() -> dict[str, dict[str, Any]]:
    """Return stages whose parameters change what they promise, by what the page calls them."""
    return {
        "kmeans exact_zero = false": {"codec": "kmeans", "exact_zero": False},
        "ternary alpha = 1.0": {"codec": "ternary", "alpha": 1.0},
        "sign scale = 1.0": {"codec": "sign", "scale": 1.0},
        "sign scale = 100.0": {"codec": "sign", "scale": 100.0},
        "rqm clip = 64.0": {"codec": "rqm", "clip": 64.0, "extension": 64.0},
    }


def pair_refusal(first: str, second: str) -> str | None:
    """Return why no pipeline has the second stage after the first, or None if one has."""
    try:
        shortest(first, second)
    except InvalidInput as error:
        return ORDER if place(first) >= place(second) else str(error)
    return None


def job_tree(
    stages: Stages, *, side: str, max_examples: int, error_feedback: bool = False, over_select: float = 1.0
) -> dict[str, Any]:
    """Return a job with these stages on one side."""
    known = variants()
    compression: dict[str, Any] = {side: [known.get(name, {"codec": name}) for name in stages]}
    if error_feedback:
        compression["error_feedback"] = {}
    return {
        "job": {"name": "any", "rounds": 1},
        "task": {"name": "any"},
        "compression": compression,
        "aggregator": {"max_examples": max_examples},
        "schedule": {"cohort": 10, "over_select": over_select},
    }


def job_refusal(stages: Stages, kind: str) -> str | None:
    """Return why a job of this kind is refused, or None."""
    try:
        make_plan(parse_job(job_tree(stages, **JOBS[kind]), "job"), "job")
    except JobFileError as error:
        return "; ".join(problem.partition(": ")[2] for problem in error.problems)
    return None


def document() -> str:
    """Return the whole page."""
    names = stages_in_order()
    pairs = {(first, second): pair_refusal(first, second) for first, second in product(names, names)}
    jobs = {(stage, kind): job_refusal(shortest(stage), kind) for stage in names for kind in JOBS}
    jobs |= {(stage, kind): job_refusal((stage,), kind) for stage in variants() for kind in JOBS}
    presets = {(name, kind): _preset_refusal(name, int(kind)) for name in PRESETS for kind in ("1", "1000")}
    return "\n".join(
        [
            HEAD,
            PAIRS,
            *_table("first ↓ second →", names, names, pairs, "P"),
            REST,
            *_table("stage", [*names, *variants()], list(JOBS), jobs, "J"),
            "## Presets\n",
            "With `aggregator.max_examples` of 1, and of 1000.\n",
            *_table("preset", list(PRESETS), ["1", "1000"], presets, "S"),
        ]
    )


def _preset_refusal(name: str, max_examples: int) -> str | None:
    tree = job_tree(("raw",), side="uplink", max_examples=max_examples) | {"compression": {"preset": name}}
    try:
        make_plan(parse_job(tree, "job"), "job")
    except JobFileError as error:
        return "; ".join(problem.partition(": ")[2] for problem in error.problems)
    return None


def _table(
    corner: str, rows: list[str], columns: list[str], cells: Mapping[tuple[str, str], str | None], letter: str
) -> Iterator[str]:
    reasons = list(dict.fromkeys(reason for reason in cells.values() if reason not in {None, ORDER}))
    yield "| " + " | ".join([corner, *(f"`{name}`" if name in CODECS.names() else name for name in columns)]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        found = [cells[row, column] for column in columns]
        texts = [
            "·" if reason is None else reason if reason == ORDER else f"{letter}{reasons.index(reason) + 1}"
            for reason in found
        ]
        yield "| " + " | ".join([f"`{row}`", *texts]) + " |"
    yield ""
    yield from (f"- {letter}{number}: {reason}" for number, reason in enumerate(reasons, 1))
    yield ""


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` compare it."""
    text = document()
    if arguments == ["--check"]:
        return 0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
