"""docs/compatibility.md: current, right where it accepts, and right where it refuses."""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np
import pytest

from fedcodec.base import KINDS
from fedcodec.presets import PRESETS
from fedcore.draws import PrivateDraws
from fedcore.errors import JobFileError
from fedcore.jobfile import parse_job
from fedserver.rounds.admission import check_values
from fedserver.rounds.plan import Plan, make_plan
from scripts import generate_compatibility as page

SIZES: Final = (150, 1, 49)
NAMES: Final = page.stages_in_order()

REFUSED_PAIRS: Final = {
    # Where the large values are is what these would have to hide.
    ("top-k", "rqm"),
    ("threshold", "rqm"),
    # Positions that follow from a seed leave no room for others.
    *product(["rand-k"], ["kmeans", "kmeans-auto", "fixed-positions", "rice"]),
    *product(["rqm"], ["fixed-positions", "rice"]),
    # Over 256 codes.
    *product(["raw", "bf16", "fp16", "ranks"], ["huffman"]),
}
REFUSED_JOBS: Final = {
    ("rqm", "uplink, weights from 1 to 1000"),
    *product(["ranks"], page.JOBS),
    # Nothing is lost, or more may be lost than there was, or what is hidden would be taken out again.
    *product(
        ["per-tensor", "raw", "fixed-symbols", "zstd", "clip", "gaussian-noise", "threshold", "rand-k", "fp16", "int2"],
        ["uplink with error feedback"],
    ),
    ("rqm", "uplink with error feedback"),
    # An update's own business, or nothing says how far off what clients get is.
    *product(["clip", "gaussian-noise", "rqm", "threshold", "rand-k", "fp16", "int2"], ["downlink"]),
    # By their parameters: further from 0 than what they stand for, or above what an update may hold.
    *product(
        ["kmeans exact_zero = false", "ternary alpha = 1.0", "sign scale = 1.0"],
        ["uplink with error feedback", "downlink"],
    ),
    *product(["sign scale = 100.0", "rqm clip = 64.0"], page.JOBS),
}
"""By hand: what the page must refuse, and nothing else."""


def plan_of(stages: page.Stages, kind: str) -> Plan:
    return make_plan(parse_job(page.job_tree(stages, **page.JOBS[kind]), "job"), "job")


def run_through(plan: Plan) -> None:
    """Encode, look at, add up and read one update, as client and server do."""
    values = np.random.default_rng(0).normal(0, 1e-2, sum(SIZES)).astype(np.float32)
    fold = plan.open_fold(values.size)
    assert fold is not None
    for pipeline in (plan.uplink, plan.downlink):
        frame = pipeline.encode(values, PrivateDraws(b"secret"), SIZES)
        assert len(frame) <= pipeline.max_frame_bytes(SIZES)
        check_values(pipeline.open(frame, SIZES), plan.job.aggregator.max_abs)
        fold.add(pipeline.open(frame, SIZES), 1)
    assert np.isfinite(np.concatenate(list(fold.mean_blocks()))).all()


def test_page_is_current() -> None:
    """Renew it with ``python scripts/generate_compatibility.py``."""
    assert page.TARGET.read_text(encoding="utf-8") == page.document()


@pytest.mark.parametrize(("first", "second"), list(product(NAMES, NAMES)))
def test_two_stages(first: str, second: str) -> None:
    refusal = page.pair_refusal(first, second)
    if page.place(first) >= page.place(second):
        assert refusal == page.ORDER
    elif (first, second) in REFUSED_PAIRS:
        assert refusal is not None
        assert first in refusal or second in refusal
    else:
        assert refusal is None
        stages = page.shortest(first, second)
        assert stages.index(first) < stages.index(second)
        if "ranks" not in stages:
            run_through(plan_of(stages, "uplink, equal weights"))


@pytest.mark.parametrize(("stage", "kind"), list(product([*NAMES, *page.variants()], page.JOBS)))
def test_stage_and_the_rest_of_the_job(stage: str, kind: str) -> None:
    stages = (stage,) if stage in page.variants() else page.shortest(stage)
    if (stage, kind) in REFUSED_JOBS:
        with pytest.raises(JobFileError):
            plan_of(stages, kind)
    else:
        run_through(plan_of(stages, kind))


def test_every_step_is_in_the_page() -> None:
    assert {KINDS[page.place(name)] for name in NAMES} == set(KINDS)
    assert page.document().count("| `fedzip` |") == 1
    assert all(f"| `{name}` |" in page.document() for name in PRESETS)
