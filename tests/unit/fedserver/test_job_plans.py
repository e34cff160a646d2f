"""What a job file may combine, and what a preset stands for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from fedcodec import build_pipeline
from fedcodec.presets import PRESETS
from fedcore.errors import JobFileError
from fedcore.jobfile import Job, load_job, parse_job
from fedserver.rounds.plan import Plan, make_plan
from tests.support.server import small_job

CATALOGUE: Final = Path(__file__).parents[3] / "compression" / "fedcodec" / "README.md"
RQM = [{"codec": "rqm"}]
TOP = [{"codec": "top-k"}]


def plan_of(max_examples: int = 1, **compression: Any) -> Plan:
    tree = small_job().model_dump(mode="json") | {"compression": compression}
    tree["aggregator"]["max_examples"] = max_examples
    return make_plan(parse_job(tree, "job"), "job")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"downlink": RQM}, "downlink: rqm hides an update from the server, and versions come from the server"),
        ({"downlink": [{"codec": "clip"}]}, "downlink: clip is for updates, and a version is none"),
        ({"uplink": RQM, "max_examples": 2}, "every update must weigh the same: set aggregator.max_examples to 1"),
        ({"error_feedback": {}}, "error_feedback: the uplink leaves nothing out"),
        ({"uplink": RQM, "error_feedback": {}}, "error_feedback: rqm hides the update by what it draws"),
        ({"uplink": [{"codec": "rand-k"}], "error_feedback": {}}, "error_feedback: rand-k is no contraction"),
        ({"uplink": [{"codec": "clip"}, *TOP], "error_feedback": {}}, "error_feedback: clip is no contraction"),
        (
            {"uplink": [{"codec": "ternary", "alpha": 1.0}], "error_feedback": {}},
            "error_feedback: ternary is no contraction",
        ),
        ({"preset": "fedzipp"}, "compression.preset: unknown preset 'fedzipp': did you mean 'fedzip'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(JobFileError, match=why):
        plan_of(**changes)


def test_all_misfits_are_said_at_once() -> None:
    with pytest.raises(JobFileError) as error:
        plan_of(uplink=RQM, downlink=RQM, error_feedback={}, max_examples=7)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "compression.downlink",
        "compression.uplink",
        "compression.error_feedback",
    ]


@pytest.mark.parametrize(
    "uplink", [TOP, [{"codec": "ternary"}], [{"codec": "sign", "scale": "mean"}], [{"codec": "int8"}]]
)
def test_contractions_may_be_fed_back(uplink: list[dict[str, Any]]) -> None:
    assert plan_of(uplink=uplink, error_feedback={}).job.compression.error_feedback is not None


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_replaced_by_stages_that_run(name: str) -> None:
    plan = plan_of(preset=name)
    written = plan.job.compression
    assert written.preset is None
    assert (written.error_feedback is not None) == PRESETS[name].error_feedback
    assert Job.from_json(plan.job.to_json()) == plan.job
    assert make_plan(plan.job, "job").job == plan.job
    values = np.random.default_rng(0).normal(0, 1e-3, 1000).astype(np.float32)
    sizes = (900, 100)
    for pipeline in (plan.uplink, plan.downlink):
        decoded = pipeline.decode(pipeline.encode(values, np.random.default_rng(1), sizes), sizes)
        assert np.isfinite(decoded).all()
    assert plan.uplink == build_pipeline(PRESETS[name].uplink)
    assert plan.downlink == build_pipeline(PRESETS[name].downlink)


@pytest.mark.parametrize("also", [{"uplink": TOP}, {"downlink": TOP}, {"error_feedback": {}}])
def test_preset_stands_alone(also: dict[str, Any]) -> None:
    with pytest.raises(JobFileError, match="preset 'int8' stands for the whole section, so it goes without"):
        plan_of(preset="int8", **also)


@pytest.mark.parametrize("name", PRESETS)
def test_catalogue_writes_out_what_a_preset_stands_for(name: str) -> None:
    (row,) = [
        line
        for line in CATALOGUE.read_text("utf-8").splitlines()
        if line.startswith(f"| `{name}` | {PRESETS[name].about} |")
    ]
    *_, uplink, downlink, error_feedback = [cell.strip(" `") for cell in row.strip("|").split("|")]
    written = tomllib.loads(f"uplink = {uplink}\ndownlink = {downlink}")
    assert written == {"uplink": list(PRESETS[name].uplink), "downlink": list(PRESETS[name].downlink)}
    assert error_feedback == ("{}" if PRESETS[name].error_feedback else "none")


def test_preset_beside_the_same_written_out_is_refused_in_a_file(tmp_path: Path) -> None:
    """By value it could not be told from the defaults."""
    path = tmp_path / "job.toml"
    text = '[job]\nname = "a"\nrounds = 1\n[task]\nname = "a"\n[schedule]\ncohort = 1\n[compression]\npreset = "int8"\n'
    path.write_text(text, encoding="utf-8")
    assert load_job(path).compression.preset == "int8"
    path.write_text(text + 'uplink = [{ codec = "raw" }]\n', encoding="utf-8")
    with pytest.raises(JobFileError, match="preset stands for the whole section, so it goes without uplink"):
        load_job(path)


@pytest.mark.parametrize(
    ("uplink", "largest"),
    [
        ([{"codec": "sign", "scale": 100.0}], "100"),
        ([{"codec": "rqm", "clip": 64.0, "extension": 1.0}], "65"),
        ([{"codec": "clip"}, {"codec": "gaussian-noise", "std": 20.0}], "120"),
    ],
)
def test_what_is_always_refused_later_is_refused_at_once(uplink: list[dict[str, Any]], largest: str) -> None:
    with pytest.raises(JobFileError, match=f"values up to {largest} are made, and above aggregator.max_abs 64"):
        plan_of(uplink=uplink)
