"""`fedserver cost` and the methods in `fedserver methods`, as a user calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedcore.cli import run_app
from fedcore.errors import Exit
from fedcore.methods import METHODS
from fedserver.cli import app

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "examples" / "digits.toml")
SHAPES = str(ROOT / "examples" / "shapes-of-digits.toml")

JOB = """
[job]
name = "snli"
rounds = 1
[task]
name = "hf-sequence-classification"
model = "google-bert/bert-base-cased"
[adapter]
name = "lora"
rank = 32
targets = ["query", "value"]
[compression]
uplink = [{ codec = "top-k", fraction = 0.1 }]
downlink = [{ codec = "bf16" }]
[schedule]
cohort = 3
"""


def cost(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run_app(app, "fedserver", ["cost", *arguments, "--json"]) == Exit.OK
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_app(app, "fedserver", ["cost", *arguments]) == Exit.INVALID
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_one_method_and_rank_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "mistral-7b", "--method", "fed-sb", "--rank", "200", "--clients", "25"]
    answer = cost(capsys, *arguments)
    assert answer["parameters_up"] == answer["parameters_down"] == 8_960_000
    assert answer["bytes_up"] == answer["bytes_down"] == 35_840_000
    assert (answer["model"], answer["method"], answer["rank"]) == ("mistral-7b", "fed-sb", 200)
    assert (answer["clients"], answer["matrices"], answer["bytes_per_value"]) == (25, 224, 4)
    assert answer["all_bytes_down"] == 25 * 35_840_000
    half = cost(capsys, *arguments, "--bytes-per-value", "2")
    assert (half["parameters_up"], half["bytes_up"]) == (8_960_000, 17_920_000)


def test_table_has_every_method_at_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "llama-3.2-3b", "--rank", "200", "--rank", "32", "--clients", "5"]
    answer = cost(capsys, *arguments)
    rows = [(row["method"], row["rank"]) for row in answer["costs"]]
    assert rows == [("full", None), *((name, rank) for name in list(METHODS)[1:] for rank in (32, 200))]
    assert run_app(app, "fedserver", ["cost", *arguments]) == Exit.OK
    text = capsys.readouterr().out
    assert text.startswith("llama-3.2-3b: 196 adapted matrices, 5 clients, 4 bytes a value;")
    assert re.search(r"^flora +32 +48,627,712 +243,138,560 +195 MB +973 MB +973 MB +4\.86 GB$", text, re.M)
    assert re.search(r"^rolora +32 +24,772,608 / 23,855,104 ", text, re.M)
    assert "fed-sb, rank 200, once before the first round: down 311,763,200 (1.25 GB); up 2,818,572,288" in text


def test_job_gives_rank_targets_clients_model_and_pipelines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    answer = cost(capsys, str(file), "--method", "fedit")
    assert (answer["job"], answer["job_method"], answer["model"]) == ("snli", "fedit", "bert-base")
    assert (answer["clients"], answer["matrices"], answer["rank"]) == (3, 24, 32)
    # What the adapter of this job sends is its factors; no head.
    assert answer["parameters_up"] == 1_181_955 - 2_307
    assert answer["frame_bytes_up"] is None
    assert answer["max_frame_bytes_up"] < answer["bytes_up"] / 3
    assert 2 * answer["parameters_down"] < answer["frame_bytes_down"] < 2 * answer["parameters_down"] + 20
    other = cost(capsys, str(file), "--method", "fedit", "--rank", "8", "--clients", "7", "--target", "key")
    assert (other["clients"], other["matrices"], other["parameters_up"]) == (7, 12, 12 * 8 * 2 * 768)


def test_job_counts_what_it_trains_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB.replace('"lora"', '"lora"\ntrainable = ["classifier.*"]'))
    assert cost(capsys, str(file), "--method", "fedit")["parameters_up"] == 1_181_955
    alone = JOB.replace(
        'name = "lora"\nrank = 32\ntargets = ["query", "value"]', 'name = "full"\ntrainable = ["*.bias"]'
    )
    file.write_text(alone)
    answer = cost(capsys, str(file), "--method", "full")
    assert (answer["job_method"], answer["parameters_up"]) == ("full", 12 * (7 * 768 + 3072) + 768 + 768 + 3)


def test_a_fed_sb_job_counts_squares_and_its_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB.replace('"lora"', '"lora-sb"\nvotes = true'))
    answer = cost(capsys, str(file), "--method", "fed-sb")
    assert (answer["job_method"], answer["parameters_up"]) == ("fed-sb", 24 * 32**2)
    assert answer["setup_parameters_up"] == 24 * 768**2
    file.write_text(JOB.replace('"lora"', '"lora-sb"\nalpha = 16'))
    assert "adapter.alpha" in refused(capsys, str(file))


def test_job_of_the_demo_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cost", DIGITS, "--model", SHAPES, "--target", "hidden*", "--rank", "16"]
    assert run_app(app, "fedserver", arguments) == Exit.OK
    text = capsys.readouterr().out
    assert re.search(r"^fedit \* +16 +7,168 +7,168 .* 28,680 B +28,680 B$", text, re.M)
    assert text.endswith("* what job digits does; frames: through its [compression], ≤ a bound, else exactly\n")


def test_bound_of_a_frame_is_told_from_a_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    assert run_app(app, "fedserver", ["cost", str(file), "--method", "fedit"]) == Exit.OK
    assert re.search(r"≤ [0-9,]+ B +[0-9,]+ B$", capsys.readouterr().out, re.M)


def test_what_cannot_be_counted_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "say --model" in refused(capsys)
    assert "say --model" in refused(capsys, DIGITS)
    assert "rank 16: output is 10 × 128" in refused(capsys, DIGITS, "--model", SHAPES, "--rank", "16", "--target", "*")
    assert "did you mean 'mistral-7b'" in refused(capsys, "--model", "mistral")
    assert "did you mean 'flora'" in refused(capsys, "--model", "bert-base", "--method", "flor")
    file = tmp_path / "job.toml"
    file.write_text(JOB.replace('"lora"', '"prefix"'))
    assert (
        "adapter 'prefix' with rule 'weighted-mean': costs are known of full with weighted-mean, lora with"
        in refused(capsys, str(file))
    )
    file.write_text(JOB.replace("rank = 32", "rank = 0"))
    assert "adapter.rank" in refused(capsys, str(file))
    file.write_text(JOB.replace('"bf16"', '"bf17"'))
    assert "compression.downlink" in refused(capsys, str(file))
    for option in (["--rank", "0"], ["--clients", "0"], ["--bytes-per-value", "0"]):
        assert run_app(app, "fedserver", ["cost", "--model", "bert-base", *option]) == Exit.USAGE


def test_methods_says_what_each_sends_and_how_a_job_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, "fedserver", ["methods", "--json"]) == Exit.OK
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert list(rows) == list(METHODS)
    assert {(row["adapter"], row["rule"]) for row in rows.values()} >= {("lora", "flora"), ("lora-sb", "weighted-mean")}
    assert rows["rolora"]["up"] == "B (m × r), then A (r × n)"
    assert [name for name, row in rows.items() if row["changes_base"]] == ["flora", "fedex-lora"]
    assert run_app(app, "fedserver", ["methods"]) == Exit.OK
    assert re.search(
        r"^  fed-sb +lora-sb +weighted-mean +yes +no +R \(r × r\) +R \(r × r\) +Singhal", capsys.readouterr().out, re.M
    )


def documented(table: int) -> list[list[str]]:
    """Return the rows of a table in docs/cost.md: cells without their backticks."""
    text = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?:^\|.*\n)+", text, re.M)[table].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_document_has_the_methods_as_they_are() -> None:
    yes = {True: "yes", False: "no"}
    said = [(row[0], row[1], row[2], row[5], row[6]) for row in documented(0)]
    assert said == [
        (each.name, each.up_text, each.down_text, yes[each.exact], yes[each.changes_base]) for each in METHODS.values()
    ]
    assert [row[7] for row in documented(0)] == [each.source for each in METHODS.values()]


def test_document_has_every_key_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = cost(capsys, "--model", "bert-base", "--method", "fedit")
    keys = [key for row in documented(2) for key in re.findall(r"\w+", row[0])]
    assert sorted(keys) == sorted(answer)
