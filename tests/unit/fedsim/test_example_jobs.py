"""The jobs that `fedsim compare examples/digits-*.toml` compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcodec.presets import PRESETS
from fedcore.jobfile import load_job
from fedserver.rounds.plan import make_plan
from fedsim.comparison import load_jobs

EXAMPLES = Path(__file__).parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("digits-*.toml"))


def test_every_preset_that_any_job_can_name_is_compared() -> None:
    assert {path.stem.removeprefix("digits-") for path in FILES} == PRESETS.keys() - {"rqm"}
    assert [job.job.name for job in load_jobs(FILES)] == [path.stem for path in FILES]


def test_the_jobs_differ_in_their_compression_alone() -> None:
    def rest(path: Path) -> dict[str, Any]:
        tree = load_job(path).model_dump(mode="json")
        del tree["compression"], tree["job"]["name"], tree["job"]["description"]
        return tree

    assert len({json.dumps(rest(path)) for path in FILES}) == 1
    assert len({make_plan(load_job(path), str(path)).job.compression.model_dump_json() for path in FILES}) == len(FILES)


def test_each_job_has_the_compression_of_its_name() -> None:
    for path in FILES:
        assert load_job(path).compression.preset == path.stem.removeprefix("digits-")
