"""The table and the picture of `fedsim compare`, and which jobs it takes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import InvalidInput, JobFileError
from fedcore.jobfile import Job
from fedserver.export import Exported
from fedsim.comparison import Run, curve, load_jobs, plot_png, table, write_plot
from fedsim.summary import Bounds, summarise
from tests.support.exports import make_job

FEDZIP = make_job(compression={"preset": "fedzip"})
HIDING = make_job(compression={"preset": "rqm"}, aggregator={"max_examples": 1})
EXPORTED = Exported(Path("out"), (), Path("out/model.safetensors"), Path("out/README.md"), None, None)


def history(accuracies: Sequence[float], *, up: int = 100, errors: Sequence[float | None] = ()) -> list[dict[str, Any]]:
    """Return the rows of a job whose version 0 took 1000 bytes, and every other one 1000 raw, `up` up and 200 down."""
    rows = []
    for version, accuracy in enumerate(accuracies):
        traffic = (up, 200, 1000) if version else (1000, 0, 0)
        named = dict(zip(("uplink_bytes", "downlink_bytes", "raw_uplink_bytes"), traffic, strict=True))
        error = dict(enumerate(errors, 1)).get(version)
        evaluation = {"accuracy": accuracy, "loss": 10 * (1 - accuracy), "num_examples": 10.0}
        same = {"sha256": "ab", "encoding_error": error, "epsilon": None, "evaluation": evaluation}
        rows.append({"version": version, **same, **named})
    return rows


def run(name: str, rows: list[dict[str, Any]], *, job: Job = FEDZIP, seed: int = 0) -> Run:
    return Run(name, seed, summarise(job, rows, 5, None, EXPORTED), rows)


def write_job(path: Path, name: str, *, seed: int = 3, more: str = "") -> Path:
    path.write_text(
        f'[job]\nname = "{name}"\nrounds = 1\nseed = {seed}\n[task]\nname = "digits"\n[schedule]\ncohort = 1\n{more}',
        encoding="utf-8",
    )
    return path


def test_bytes_are_summed_and_compared_with_what_values_take_raw() -> None:
    summary = run("one", history([0.2, 0.5, 0.6], up=250, errors=[0.9, 0.7])).summary
    assert (summary.uplink_bytes, summary.downlink_bytes, summary.raw_uplink_bytes) == (1500, 400, 2000)
    assert summary.ratio == 2000 / 1500
    assert summary.relative_error == pytest.approx(0.8)


def test_what_a_round_takes_is_told_apart_from_version_0_and_rounds_that_take_more() -> None:
    rows = history([0.2, 0.5, 0.6, 0.7], up=10)
    rows[0]["uplink_bytes"], rows[1]["uplink_bytes"], rows[3]["uplink_bytes"] = 5, 900, 11
    assert run("one", rows).summary.round_uplink_bytes == 10


def test_epsilon_is_that_of_the_last_version() -> None:
    rows = history([0.2, 0.5])
    rows[0]["epsilon"], rows[1]["epsilon"] = 0.0, 1.23456
    assert run("one", rows).summary.epsilon == 1.23456
    assert table([run("one", rows), run("two", history([0.2, 0.5]))])[1].endswith(" 1.23")


def test_losses_are_those_of_the_first_and_the_last_version_and_of_the_bounds() -> None:
    rows = history([0.2, 0.5, 0.6])
    one = run("one", rows).summary
    assert [one.base_loss, one.final_loss] == pytest.approx([8, 4])
    assert one.pooled_loss is None
    bounded = summarise(FEDZIP, rows, 5, Bounds({"loss": 9.0}, {"loss": 3.0}), EXPORTED)
    assert [bounded.base_loss, bounded.final_loss, bounded.pooled_loss] == pytest.approx([9, 4, 3])


def test_versions_of_which_no_client_says_what_was_lost_do_not_count_as_exact() -> None:
    assert run("one", history([0.2, 0.5, 0.6], errors=[None, 0.7])).summary.relative_error == 0.7


def test_what_lossless_codecs_lose_is_nothing_and_what_hiding_ones_lose_is_unknown() -> None:
    rows = history([0.2, 0.5])
    assert run("raw", rows, job=make_job()).summary.relative_error == 0.0
    assert run("rqm", rows, job=HIDING).summary.relative_error is None


def test_a_run_as_json_is_its_summary_with_job_and_seed() -> None:
    one = run("one", history([0.2, 0.5]), seed=4)
    assert one.as_json() == {"job": "one", "seed": 4, **one.summary.as_json()}


def test_the_table_has_a_line_for_each_job_with_means_over_its_seeds() -> None:
    lines = table(
        [
            run("one", history([0.2, 0.50], up=1000), job=make_job()),
            run("two", history([0.2, 0.50], up=100, errors=[0.5]), seed=0),
            run("two", history([0.2, 0.60], up=300, errors=[0.7]), seed=1),
        ]
    )
    cells = [line.split("  ") for line in lines]
    assert [[cell.strip() for cell in row if cell] for row in cells] == [
        ["job", "rounds", "accuracy", "loss", "up, a round", "up", "down", "raw : up", "error", "epsilon"],
        ["one", "1", "50.0%", "5", "1 kB", "2 kB", "200 B", "0.5", "0", "-"],
        ["two", "1", "55.0% (50.0% to 60.0%)", "4.5 (4 to 5)", "200 B", "1.2 kB", "200 B", "0.839", "0.6", "-"],
    ]


def test_what_was_not_measured_is_a_dash_in_the_table() -> None:
    rows = history([0.2, 0.5])
    for row in rows:
        row["evaluation"] = {"perplexity": 2.0}
    cells = table([run("one", rows, job=HIDING)])[1].split()
    assert cells == ["one", "1", "-", "-", "100", "B", "1.1", "kB", "200", "B", "0.909", "-", "-"]


def test_the_curve_counts_the_bytes_of_both_ways_of_every_version_measured_or_not() -> None:
    rows = history([0.2, 0.3, 0.4, 0.5])
    rows[1]["evaluation"] = {}
    assert curve(rows, "accuracy") == [(1000, 0.2), (1600, 0.4), (1900, 0.5)]


def test_the_picture_follows_what_was_measured() -> None:
    one, other = (run("one", history([0.2, last])) for last in (0.5, 0.6))
    assert plot_png([one]) == plot_png([one])
    assert plot_png([one]) != plot_png([other])


@pytest.mark.parametrize("num_jobs", [1, 30])
def test_any_number_of_jobs_and_seeds_can_be_drawn(num_jobs: int, tmp_path: Path) -> None:
    runs = [run(f"job-{i}", history([0.2, 0.5, i / 30]), seed=seed) for i in range(num_jobs) for seed in (0, 1)]
    path = write_plot(runs, tmp_path)
    assert path is not None
    assert struct.unpack(">II", path.read_bytes()[16:24])[0] == 910


def test_jobs_without_any_figure_can_be_drawn() -> None:
    rows = [{**row, "evaluation": {}} for row in history([0.2, 0.5])]
    assert plot_png([run("one", rows)]).startswith(b"\x89PNG")


def test_without_a_run_there_is_no_picture(tmp_path: Path) -> None:
    assert write_plot([], tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_each_job_comes_with_its_seed_and_the_next_ones(tmp_path: Path) -> None:
    paths = [write_job(tmp_path / "a.toml", "a"), write_job(tmp_path / "b.toml", "b", seed=8)]
    jobs = load_jobs(paths, 2)
    assert [(job.job.name, job.job.seed) for job in jobs] == [("a", 3), ("a", 4), ("b", 8), ("b", 9)]
    assert {job.job.rounds for job in jobs} == {1}


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [write_job(tmp_path / f"{file}.toml", "same") for file in "ab"]
    with pytest.raises(InvalidInput, match=r"b\.toml: the job in .*a\.toml is named 'same' too"):
        load_jobs(paths)


def test_a_job_that_could_not_be_run_is_refused_before_any_runs(tmp_path: Path) -> None:
    paths = [
        write_job(tmp_path / "a.toml", "a"),
        write_job(tmp_path / "b.toml", "b", more='[compression]\npreset = "rqm"\n'),
    ]
    with pytest.raises(JobFileError, match="max_examples"):
        load_jobs(paths)


def test_a_seed_beyond_the_last_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"job\.seed"):
        load_jobs([write_job(tmp_path / "a.toml", "a", seed=2**53 - 1)], 2)
