"""`fedclient privacy`: figures with their conditions, and what is left of the policy's limits."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant

from fedclient.cli import app
from fedclient.ledger import FileLedger
from fedclient.releases import Entry
from fedcore.cli import run_app
from fedcore.errors import Exit
from fedprivacy.events import Adjacency, Gaussian, History, Release, Trust, Unit

DELTA = 1e-6


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def note(folder: Path, job_id: str, multiplier: float | None) -> None:
    history = None
    if multiplier is not None:
        release = Release(mechanisms=(Gaussian(noise_multiplier=multiplier),))
        history = History(unit=Unit.CLIENT, adjacency=Adjacency.ZERO_OUT, trust=Trust.LOCAL, releases=(release,))
    entry = Entry(
        job_id=job_id,
        job_name=f"job-{job_id[0]}",
        version=1,
        kind="train",
        assignment_id="f" * 32,
        released=history,
        wall_s=1.0,
    )
    ledger = FileLedger(folder)
    with ledger.locked():
        ledger.append(entry)


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run_app(app, "fedclient", ["privacy", "--folder", str(folder), *options]) == Exit.OK
    return capsys.readouterr().out


def test_each_job_and_all_together_with_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job_id, multiplier in (("a", 4.0), ("a", 4.0), ("b", 2.0)):
        note(tmp_path, job_id * 32, multiplier)
    policy = tmp_path / "policy.toml"
    policy.write_text(f"[privacy]\nepsilon_per_job = 3\nepsilon_in_all = 2.0\ndelta = {DELTA}\n", encoding="utf-8")
    found = json.loads(shown(tmp_path, capsys, "--json"))
    expected = [
        PLDAccountant().compose(dp.GaussianDpEvent(4.0), 2).get_epsilon(DELTA),
        PLDAccountant().compose(dp.GaussianDpEvent(2.0)).get_epsilon(DELTA),
        PLDAccountant().compose(dp.GaussianDpEvent(4.0), 2).compose(dp.GaussianDpEvent(2.0)).get_epsilon(DELTA),
    ]
    rows = [*found["jobs"], found["in_all"]]
    assert [row["epsilon"] for row in rows] == pytest.approx(expected, rel=1e-3)
    assert [row["updates"] for row in rows] == [2, 1, 3]
    assert [row["left"] for row in rows[:2]] == pytest.approx([3 - each for each in expected[:2]], rel=1e-2)
    assert rows[2]["left"] == 0.0
    assert [row["name"] for row in rows[:2]] == ["job-a", "job-b"]
    assert all(row["guarantee"]["unit"] == "client" and row["delta"] == DELTA for row in rows)
    text = shown(tmp_path, capsys)
    assert f"job job-a (aaaaaa): 2 updates; epsilon {rows[0]['epsilon']:.4g}, delta 1e-06; 1.456 left of 3\n" in text
    assert "  unit: one client with all its data (client)" in text
    assert f"all jobs together: 3 updates; epsilon {rows[2]['epsilon']:.4g}, delta 1e-06; 0 left of 2\n" in text


def test_what_nothing_hides_has_no_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note(tmp_path, "a" * 32, 4.0)
    note(tmp_path, "b" * 32, None)
    found = json.loads(shown(tmp_path, capsys, "--json"))
    assert [row["epsilon"] is None for row in [*found["jobs"], found["in_all"]]] == [False, True, True]
    assert found["in_all"]["unprotected"] == 1
    assert found["in_all"]["guarantee"] is None
    text = shown(tmp_path, capsys)
    assert "job job-b (bbbbbb): 1 update, 1 of them without privacy; no bound\n" in text


def test_where_nothing_was_released_epsilon_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "other.toml"
    policy.write_text("[privacy]\nepsilon_in_all = 4\n", encoding="utf-8")
    assert shown(tmp_path, capsys, "--policy", str(policy)) == (
        "all jobs together: 0 updates; epsilon 0, delta 1e-05; 4 left of 4\n"
    )
