"""The jobs of examples/private: each is accepted, and equal to those it is compared with."""

from __future__ import annotations

import json
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from fedcore.jobfile import load_job, parse_job
from fedcore.privacy import DpFedAvg, DpSgd
from fedserver.rounds.plan import make_plan

FOLDER = Path(__file__).parents[3] / "examples" / "private"
FILES = sorted(FOLDER.glob("*.toml"))
METHODS = ["fed-sb", "ffa-lora", "lora"]


def table_of(path: Path) -> str:
    return "-".join(path.stem.split("-")[:2])


def shared(path: Path) -> str:
    """Return what all jobs of a table must have in common, as text."""
    tree: dict[str, Any] = load_job(path).model_dump(mode="json")
    same = {name: tree[name] for name in ("task", "schedule", "aggregator", "compression")}
    passes = (tree["job"]["rounds"] - (tree["adapter"]["name"] == "lora-sb")) * tree["training"]["local_epochs"]
    privacy = tree.get("privacy") or {}
    hidden = {name: privacy.get(name) for name in ("mechanism", "epsilon", "delta", "sampling", "noise", "evaluation")}
    return json.dumps([same, tree["job"]["seed"], passes, tree["adapter"]["targets"], hidden])


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "open"], ids=["private", "open"])
def test_the_jobs_of_a_table_differ_in_method_and_its_settings_alone(folder: Path) -> None:
    tables = {name: list(paths) for name, paths in groupby(sorted(folder.glob("*.toml")), table_of)}
    assert list(tables) == ["digits-client", "digits-example", "lm-client", "lm-example"]
    for name, paths in tables.items():
        assert [path.stem for path in paths] == [f"{name}-{method}" for method in METHODS]
        assert len({shared(path) for path in paths}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_job_is_accepted_and_leaves_its_noise_to_its_budget(path: Path) -> None:
    tree = load_job(path).model_dump(mode="json")
    assert tree["privacy"]["noise_multiplier"] is None
    assert tree["privacy"]["epsilon"] == 3
    # What epsilon allows takes seconds to find.
    tree["privacy"]["noise_multiplier"] = 12.0
    job = make_plan(parse_job(tree, str(path)), str(path)).job
    assert isinstance(job.privacy, DpSgd if "-example-" in path.stem else DpFedAvg)
    assert job.privacy.unsafe_seed is None
    assert job.privacy.delta * job.schedule.cohort < 1


def test_the_open_jobs_hide_nothing_and_train_the_same_values() -> None:
    for path in FILES:
        job, other = load_job(path), make_plan(load_job(FOLDER / "open" / path.name), path.name).job
        assert other.privacy is None
        assert (job.job.name, other.job.name) == (path.stem, f"{path.stem}-open")
        assert (other.adapter, other.task, other.schedule) == (job.adapter, job.task, job.schedule)


def test_the_script_writes_a_job_for_each_budget(tmp_path: Path) -> None:
    subprocess.run(["sh", str(FOLDER / "variants.sh"), str(tmp_path / "jobs")], check=True)
    changed = {"job", "training", "privacy"}
    for path in FILES:
        for epsilon in (1, 3, 8):
            job = load_job(tmp_path / "jobs" / f"{path.stem}-{epsilon}.toml")
            assert job.job.name == f"{path.stem}-{epsilon}"
            assert job.privacy is not None
            assert job.privacy.epsilon == epsilon
            assert job.model_dump(exclude=changed) == load_job(path).model_dump(exclude=changed)
