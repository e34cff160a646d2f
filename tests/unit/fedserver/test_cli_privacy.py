"""`fedserver privacy`, as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedcore.cli import run_app
from fedcore.errors import Exit
from fedserver.cli import app
from fedserver.export import plot

SGD = "--mechanism dp-sgd --sampling 0.01 --delta 1e-5"


def answer(capsys: pytest.CaptureFixture[str], arguments: str) -> Any:
    assert run_app(app, "fedserver", ["privacy", *arguments.split(), "--json"]) == Exit.OK
    return json.loads(capsys.readouterr().out)


def shown(capsys: pytest.CaptureFixture[str], arguments: str) -> str:
    assert run_app(app, "fedserver", ["privacy", *arguments.split()]) == Exit.OK
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], arguments: str, code: Exit = Exit.INVALID) -> str:
    assert run_app(app, "fedserver", ["privacy", *arguments.split()]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_epsilon_of_dp_sgd(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, f"{SGD} --noise-multiplier 1 --steps 1000")
    assert found["epsilon"] == found["epsilon_pld"] == pytest.approx(1.828244, abs=2e-6)
    assert found["epsilon_rdp"] == pytest.approx(2.101367, abs=2e-6)
    assert (found["mechanism"], found["steps"], found["delta"]) == ("dp-sgd", 1000, 1e-5)
    statement = found["guarantee"]
    assert (statement["unit"], statement["adjacency"], statement["trust"]) == (
        "example",
        "add-or-remove-one",
        "central",
    )
    assert statement["epsilon"] == found["epsilon"]
    assert statement["not_covered"]
    assert "text" not in found


def test_a_client_is_the_unit_of_dp_fedavg_and_everyone_takes_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--mechanism dp-fedavg --noise-multiplier 10 --steps 50 --delta 1e-5")
    assert found["epsilon"] == pytest.approx(2.943225, abs=2e-6)
    assert found["guarantee"]["unit"] == "client"
    assert found["guarantee"]["sampling"] == ["none: the unit is taken to be in every release"]


def test_levels_per_coordinate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--mechanism rqm --levels 16 --keep 0.42 --clip 1 --extension 1 --clients 5 --orders 2,8,32"
    found = answer(capsys, arguments)
    assert found["renyi"] == pytest.approx({"2": 2.995243, "8": 4.374942, "32": 4.847142}, abs=1e-6)
    assert found["renyi_found"] == found["renyi"]
    assert found["exact"] is True
    assert found["renyi_of_one_client"] == pytest.approx({"2": 5.063546, "8": 5.344229, "32": 5.434787}, abs=1e-6)
    assert "epsilon" not in found
    many = answer(capsys, "--mechanism rqm --clients 40 --orders 2,inf")
    assert many["exact"] is False
    assert many["renyi_found"]["2"] == pytest.approx(0.502705, abs=1e-6)
    assert many["renyi_found"]["2"] < many["renyi"]["2"] < 0.7
    assert many["renyi"]["inf"] == pytest.approx(5.469889, abs=1e-6)


def test_epsilon_of_vectors_of_levels(capsys: pytest.CaptureFixture[str]) -> None:
    vector = "--mechanism rqm --clients 40 --dimension 64 --steps 50 --delta 1e-5"
    plain, clipped = answer(capsys, vector), answer(capsys, f"{vector} --l2-clip 0.25")
    assert plain["epsilon"] > 1000
    assert clipped["epsilon"] == clipped["epsilon_rdp"] == pytest.approx(8.08, abs=0.01)
    assert clipped["epsilon_pld"] is None
    assert clipped["guarantee"]["trust"] == "secure-sum"
    assert answer(capsys, "--mechanism rqm --delta 1e-5")["guarantee"]["trust"] == "local"
    steps = answer(capsys, "--mechanism rqm --clients 40 --dimension 64 --l2-clip 0.25 --delta 1e-5 --epsilon 8.09")
    assert steps["steps"] == 50


def test_pbm_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--mechanism pbm --clients 10 --orders 2,8")
    assert found["renyi"] == pytest.approx({"2": 2.280115, "8": 10.435332}, abs=2e-6)
    assert found["variance"] == pytest.approx(0.2667, abs=5e-5)


def test_dp_lora_of_the_paper_has_its_readings(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--mechanism dp-lora-paper --noise-multiplier 2 --steps 50 --delta 1e-5"
    found = answer(capsys, arguments)
    assert (found["epsilon"], found["epsilon_rdp"]) == pytest.approx((20.675508, 22.019852), abs=2e-6)
    assert [round(reading["epsilon"], 2) for reading in found["readings"]] == [20.68, 33.10, 54.38, 91.82]
    text = shown(capsys, arguments)
    assert "epsilon 20.68" in text
    assert "A and B clipped each, of a batch's mean; one example replaced: 91.82" in text


def test_the_noise_or_the_steps_are_solved_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, f"{SGD} --epsilon 3 --steps 1000")
    assert found["noise_multiplier"] == pytest.approx(0.8136, rel=3e-4)
    assert found["epsilon"] <= found["budget"] == 3
    steps = answer(capsys, "--mechanism dp-sgd --noise-multiplier 8 --delta 1e-5 --epsilon 3")
    assert 1 < steps["steps"] < 1000
    assert steps["epsilon"] <= 3
    none = answer(capsys, "--mechanism dp-sgd --noise-multiplier 1 --delta 1e-5 --epsilon 0.1")
    assert (none["steps"], none["epsilon"], none["guarantee"]) == (0, 0, None)
    assert "nothing is released" in shown(capsys, "--mechanism dp-sgd --noise-multiplier 1 --delta 1e-5 --epsilon 0.1")


def test_people_read_the_whole_statement(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, f"{SGD} --noise-multiplier 1 --steps 1000")
    for words in (
        "epsilon 1.828",
        "delta 1e-05",
        "(example)",
        "(add-or-remove-one)",
        "trust central",
        "Poisson",
        "PLD",
    ):
        assert words in text
    assert text.count("not covered") >= 4
    assert "order 2: 2.995243" in shown(capsys, "--mechanism rqm --clients 5")


def test_plot_is_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epsilon.png"
    found = answer(capsys, f"--mechanism dp-sgd --noise-multiplier 4 --steps 20 --delta 1e-5 --plot {path}")
    assert found["plot"] == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "--delta and --steps are needed" in refused(capsys, f"--mechanism rqm --plot {path}")
    none = f"--mechanism dp-sgd --noise-multiplier 1 --delta 1e-5 --epsilon 0.1 --plot {path}"
    assert "not even one step" in refused(capsys, none)
    missing = f"--mechanism dp-sgd --noise-multiplier 4 --steps 2 --delta 1e-5 --plot {tmp_path}/no/p.png"
    refused(capsys, missing, Exit.STORAGE_FAILED)
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in refused(capsys, missing)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--mechanism dp-sgd --levels 3", "--levels does not go with dp-sgd; these do: --delta"),
        ("--mechanism rqm --noise-multiplier 3", "--noise-multiplier does not go with rqm"),
        ("--mechanism dp-sgd --noise-multiplier 1 --steps 1", "--delta is needed"),
        (f"{SGD} --noise-multiplier 1", "give two of --noise-multiplier, --steps and --epsilon"),
        (f"{SGD} --noise-multiplier 1 --steps 1 --epsilon 1", "give two of"),
        (f"{SGD} --noise-multiplier -1 --steps 1", "--noise-multiplier -1: 0.001 to"),
        (f"{SGD} --noise-multiplier nan --steps 1", "--noise-multiplier nan"),
        (f"{SGD} --noise-multiplier 1 --steps 0", "--steps 0: 1 to"),
        (f"{SGD} --epsilon -1 --steps 1", "epsilon -1.0: a number above 0"),
        ("--mechanism dp-sgd --sampling 0 --delta 1e-5 --noise-multiplier 1 --steps 1", "sampling 0.0: a probability"),
        ("--mechanism dp-sgd --delta 0 --noise-multiplier 1 --steps 1", "delta 0.0: above 0 and below 1"),
        ("--mechanism dp-sgd --delta 1 --noise-multiplier 1 --steps 1", "delta 1.0: above 0 and below 1"),
        ("--mechanism rqm --levels 1", "rqm.levels: "),
        ("--mechanism rqm --keep 0", "rqm.keep: "),
        ("--mechanism rqm --keep 1", "rqm.keep: "),
        ("--mechanism rqm --extension 0", "rqm.extension: "),
        ("--mechanism rqm --clients 0", "rqm.clients: "),
        ("--mechanism rqm --clip nan", "rqm.clip: "),
        ("--mechanism pbm --theta 0.5", "pbm.theta: "),
        ("--mechanism rqm --orders 1", "--orders '1': numbers above 1"),
        ("--mechanism rqm --orders 2,x", "--orders '2,x': numbers above 1"),
        ("--mechanism rqm --orders nan", "--orders 'nan': numbers above 1"),
        ("--mechanism rqm --steps 3", "--delta is needed for an epsilon"),
        ("--mechanism rqm --delta 1e-5 --steps 3 --epsilon 1", "give --steps or --epsilon"),
        ("--mechanism dp-lora-paper --steps 3 --delta 1e-5", "--noise-multiplier is needed"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], arguments: str, problem: str
) -> None:
    assert problem in refused(capsys, arguments)


def test_an_unknown_mechanism_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dp-fedavg" in refused(capsys, "--mechanism magic", Exit.USAGE)


# -- of a job --------------------------------------------------------------------------------------------------------

JOB = """
[job]
name = "private"
rounds = 20
[task]
name = "digits"
[aggregator]
max_examples = 1
[schedule]
cohort = 4
[privacy]
delta = 1e-3
"""
SGD_KEYS = 'mechanism = "dp-sgd"\nclip = 1.0\nsampling = 0.1\n'


def job_file(folder: Path, keys: str) -> Path:
    path = folder / "job.toml"
    path.write_text(JOB + keys, encoding="utf-8")
    return path


def test_a_job_file_is_planned_as_its_steps_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = job_file(tmp_path, SGD_KEYS + "noise_multiplier = 1.5\nepsilon = 6.0\n")
    found = answer(capsys, f"{path} --plot {tmp_path / 'p.png'}")
    steps = answer(capsys, "--mechanism dp-sgd --noise-multiplier 1.5 --sampling 0.1 --steps 200 --delta 1e-3")
    assert found["epsilon"] == pytest.approx(steps["epsilon"], rel=1e-9)
    assert found["guarantee"]["adjacency"] == "zero-out"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    allowed, budget = found["rounds_within_budget"], found["budget"]
    within, beyond = (answer(capsys, f"{path} --steps {rounds}")["epsilon"] for rounds in (allowed, allowed + 1))
    assert within <= budget < beyond


def test_what_is_given_replaces_the_files_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = job_file(tmp_path, SGD_KEYS + "noise_multiplier = 1.5\n")
    solved = answer(capsys, f"{path} --epsilon 2 --delta 1e-4 --steps 5 --sampling 0.2")
    assert 1.99 < solved["epsilon"] <= 2
    assert (solved["rounds"], solved["sampling"], solved["delta"]) == (5, 0.2, 1e-4)
    again = answer(
        capsys, f"{path} --noise-multiplier {solved['noise_multiplier']} --delta 1e-4 --steps 5 --sampling 0.2"
    )
    assert again["epsilon"] == solved["epsilon"]
    assert "noise multiplier" in shown(capsys, str(path))


def test_a_population_makes_secret_cohorts_cheaper(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = 'mechanism = "dp-fedavg"\nclip = 1.0\nnoise_multiplier = 2.0\nsecret_cohort = true\n'
    path = job_file(tmp_path, keys)
    alone, many = (answer(capsys, f"{path}{more}") for more in ("", " --population 100"))
    assert many["epsilon"] < alone["epsilon"] / 3
    assert "4 of 100 without replacement" in many["guarantee"]["sampling"][0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "give either a job or --mechanism"),
        ("{path} --mechanism rqm", "give either a job or --mechanism"),
        ("{path} --orders 2", "--orders does not go with a job"),
        ("{path} --noise-multiplier 0", "noise_multiplier"),
        ("nowhere.toml --epsilon 3", "--epsilon goes with a job file, and there is no file 'nowhere.toml'"),
    ],
)
def test_questions_about_jobs_that_cannot_be_answered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, text: str
) -> None:
    path = job_file(tmp_path, SGD_KEYS + "noise_multiplier = 1.5\n")
    assert text in refused(capsys, arguments.format(path=path))


def test_a_job_that_is_not_private_has_no_guarantee(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JOB.partition("[privacy]")[0], encoding="utf-8")
    assert "is not private: it has no section [privacy]" in refused(capsys, str(path))


def test_a_job_with_rqm_is_not_priced_by_the_value(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = job_file(tmp_path, 'mechanism = "rqm"\n[compression]\nuplink = [{ codec = "rqm" }]\n')
    assert "--dimension is needed" in refused(capsys, str(path))
    found = answer(capsys, f"{path} --dimension 16 --steps 3")
    alone = answer(capsys, "--mechanism rqm --dimension 16 --steps 3 --delta 1e-3")
    assert found["epsilon"] == pytest.approx(alone["epsilon"])
