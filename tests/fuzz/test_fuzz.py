"""Every target reads some thousand inputs, the same ones every time; and a bug that was planted is found."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedcodec import CODECS
from tests.fuzz.planted import PLANTED
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS
from tests.fuzz.wire_targets import PIPELINES

SECONDS = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no build for this machine"),
]


def test_a_planted_bug_is_found_and_told_with_its_input(tmp_path: Path) -> None:
    outcome = fuzz(PLANTED.name, SECONDS, tmp_path, seed=1)
    assert "AssertionError: planted" in outcome.failure
    (crash,) = (tmp_path / PLANTED.name / "crashes").iterdir()
    assert outcome.failure.endswith(f"again: python -m tests.fuzz.run {PLANTED.name} {crash}\n")
    with pytest.raises(AssertionError, match="planted"):
        PLANTED.read(crash.read_bytes())


def test_frames_of_every_stage_of_ours_are_read() -> None:
    ours = {name for name in CODECS.names() if CODECS.get(name).__module__.startswith("fedcodec.")}
    assert ours == {stage.name for pipeline in PIPELINES for stage in pipeline.stages}


@pytest.mark.timeout(900)
def test_nothing_that_reads_bytes_breaks(tmp_path: Path) -> None:
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        outcomes = list(
            pool.map(lambda target: fuzz(target.name, SECONDS, tmp_path, runs=target.runs, seed=1), TARGETS.values())
        )
    for outcome, target in zip(outcomes, TARGETS.values(), strict=True):
        assert not outcome.failure, f"{outcome}\n{outcome.failure}"
        assert outcome.runs >= target.runs, outcome
        assert outcome.coverage[0] > 0, outcome
    # What learns nothing from what it reads does not fuzz.
    grown = [outcome.target for outcome in outcomes if outcome.coverage[1] > outcome.coverage[0]]
    assert len(grown) > len(outcomes) // 2, grown
