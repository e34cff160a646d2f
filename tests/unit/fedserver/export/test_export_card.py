"""The model card says what happened, and no job can make it say something else."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from fedcore.layout import Layout
from fedprivacy.accountant import guarantee
from fedprivacy.events import Adjacency, Gaussian, History, Release, Unit
from fedprivacy.guarantee import Guarantee
from fedserver.export.base import Exportable, Format
from fedserver.export.card import model_card
from fedserver.export.markdown import escaped
from fedserver.rounds.privacy import Spending
from tests.support.exports import FULL, LORA, make_exportable, make_history, make_job, make_state

PARSER = MarkdownIt("commonmark").enable("table")
SECTIONS = [
    "The job",
    "Data",
    "Method",
    "Figures",
    "Rounds",
    "How to load it",
    "What is not claimed",
    "How to cite it",
]


def card_of(what: Exportable, *, with_plot: bool = False) -> str:
    return model_card(what, form=Format.PEFT if what.is_lora else Format.WEIGHTS, with_plot=with_plot)


def front_matter(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded


def headings(card: str) -> list[str]:
    tokens = PARSER.parse(card.split("---\n", 2)[2])
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def table_rows(card: str, section: str) -> list[list[str]]:
    text = card.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_card_of_a_lora_job_says_how_it_came_about() -> None:
    what, _ = make_exportable(LORA)
    card = card_of(what)
    assert front_matter(card) == {
        "library_name": "peft",
        "tags": ["federated-learning", "roundtable", "lora", "digits"],
    }
    assert headings(card) == ["digits", *SECTIONS]
    assert "Everybody's digits." in card
    assert "Handwritten digits." in card
    job, method = dict(table_rows(card, "The job")), dict(table_rows(card, "Method"))
    assert job["job"] == "`digits`, id `digits-0001`, federation `north`"
    assert job["rounds done"] == "2 of 60"
    assert job["version made"] == "2027-01-15 08:00:02 UTC"
    assert what.state_sha256 in job["SHA-256 of the state"]
    assert method["adapter"] == "`lora` (rank = `2`, alpha = `8`)"
    assert method["rank"] == "2"
    assert method["adapted layers"] == "`hidden`"
    assert method["values trained"] == "14 in 2 tensors"
    assert method["local training"] == "1 epoch of adamw, learning rate 0.001, weight decay 0, batches of 32"
    assert method["uplink codecs"] == method["downlink codecs"] == "`raw`"
    assert method["aggregation rule"].startswith("`weighted-mean`")
    assert method["server optimiser"] == "`none`"
    assert method["schedule"] == ("5 clients are asked for a version; it closes with 5 updates, or after 60 s with 3")


def test_figures_are_those_of_the_first_and_the_last_version() -> None:
    what, _ = make_exportable(LORA)
    assert table_rows(card_of(what), "Figures") == [
        ["accuracy", "0.25", "0.252"],
        ["loss", "2", "1.98"],
        ["held-out examples", "356", "356"],
    ]


def test_rounds_are_counted_in_all_and_listed() -> None:
    what, _ = make_exportable(LORA)
    card = card_of(what)
    assert (
        "10 updates in 2 rounds; 11.00 kB (11,000 bytes) from clients to server, 8.00 kB (8,000 bytes) from server"
        in card
    )
    assert table_rows(card, "Rounds")[2] == ["2", "5", "1,402", "5,000", "4,000", "0.252", "1.98"]


def test_an_older_version_ignores_what_came_after_it() -> None:
    state = make_state(LORA)
    alone, _ = make_exportable(LORA)
    followed, _ = make_exportable(LORA, history=make_history(state, 2, later=5))
    assert card_of(followed) == card_of(alone)


@pytest.mark.parametrize(("version", "num_rows"), [(19, 20), (20, 20), (1000, 20)])
def test_long_histories_are_shown_by_twenty_versions_with_first_and_last(version: int, num_rows: int) -> None:
    what, _ = make_exportable(LORA, version=version)
    rows = table_rows(card_of(what), "Rounds")
    assert len(rows) == num_rows
    numbers = [int(row[0]) for row in rows]
    assert numbers[0] == 0
    assert numbers[-1] == version
    steps = {after - before for before, after in pairwise(numbers)}
    assert max(steps) - min(steps) <= 1


def test_version_that_was_never_measured_says_so() -> None:
    state = make_state(LORA)
    history = make_history(state, 2)
    history[2]["evaluation"] = {}
    what, _ = make_exportable(LORA, history=history)
    assert "Version 2 itself has not been measured." in card_of(what)
    what, _ = make_exportable(LORA, history=make_history(state, 2, measured=False))
    assert "No client has measured this job's versions." in card_of(what)


def test_version_zero_has_a_card() -> None:
    what, _ = make_exportable(FULL, version=0)
    assert "Counted in all: 0 updates in 0 rounds" in card_of(what)


def test_base_model_is_in_the_front_matter_if_a_hub_could_know_it() -> None:
    for base, front in (("org/tiny-llama", "org/tiny-llama"), ("/models/llama", None)):
        what, _ = make_exportable(LORA, job=make_job(task={"name": "text", "base_model": base}))
        card = card_of(what)
        assert front_matter(card).get("base_model") == front
        assert dict(table_rows(card, "Method"))["base model"] == f"`{base}`"


def test_card_of_full_weights_names_no_peft() -> None:
    what, _ = make_exportable(FULL)
    card = card_of(what)
    assert "library_name" not in front_matter(card)
    assert "peft" not in card


def test_no_privacy_is_claimed() -> None:
    what, _ = make_exportable(LORA)
    assert "**No privacy guarantee.** The job ran without differential privacy." in card_of(what)


PRIVATE = {"mechanism": "dp-fedavg", "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-5}


def private_card(budget: float | None = None, unsafe_seed: int | None = None) -> tuple[str, Guarantee]:
    release = Release(mechanisms=(Gaussian(noise_multiplier=2.0),), count=7)
    found = guarantee(History(unit=Unit.CLIENT, adjacency=Adjacency.ZERO_OUT, releases=(release,)), 1e-5)
    what, _ = make_exportable(LORA, job=make_job(privacy=PRIVATE))
    spending = Spending(found, 9.0, budget, unsafe_seed)
    privacy = json.loads(json.dumps(spending.as_json()))
    return card_of(replace(what, privacy=privacy)), found


def test_a_guarantee_is_printed_whole() -> None:
    card, found = private_card(budget=8.0)
    rows = table_rows(card, "Privacy")
    assert [text for name, text in rows if name == "not covered"] == [escaped(text) for text in found.not_covered]
    shown = dict(rows)
    assert shown["epsilon"] == escaped(f"{found.epsilon:.4g}")
    assert shown["mechanism"].startswith("`dp-fedavg` (evaluation = `false`, clip = `0.5`, noise")
    assert shown["budget"] == "epsilon 8"
    for name in ("delta", "unit", "adjacency", "trust", "sampling", "accountant", "epsilon (PLD)", "epsilon (RDP)"):
        assert shown[name]
    assert "No privacy guarantee" not in card


def test_an_unsafe_seed_guarantees_nothing() -> None:
    card, _ = private_card(unsafe_seed=42)
    assert dict(table_rows(card, "Privacy"))["unsafe seed"] == "42: **nothing is hidden from who knows it**"
    assert "**No privacy guarantee.** All draws followed from the seed 42" in card


def test_plot_is_shown_if_there_is_one() -> None:
    what, _ = make_exportable(LORA)
    assert "](rounds.png)" in card_of(what, with_plot=True)
    assert "rounds.png" not in card_of(what, with_plot=False)


EVIL = "---\nlicense: mit\n---\n\n# All is well\n\n## Figures\n\n| accuracy | 1.0 |\n<script>x</script>\n```\n"


def test_hostile_text_cannot_break_the_card() -> None:
    state = make_state(LORA)
    history = make_history(state, 2)
    history[2]["evaluation"][EVIL] = 0.5
    job = make_job(
        job={"name": "digits", "rounds": 60, "description": EVIL},
        task={"name": "digits", "data": EVIL, "base_model": EVIL, "key`|\n# k": EVIL, "path": {"a|b": ["`", "\\|"]}},
    )
    what, _ = make_exportable(LORA, job=job, history=history)
    card = card_of(what)
    assert front_matter(card) == {
        "library_name": "peft",
        "tags": ["federated-learning", "roundtable", "lora", "digits"],
    }
    body = card.split("---\n", 2)[2]
    assert headings(card) == ["digits", *SECTIONS]
    tokens = PARSER.parse(body)
    assert [token.content for token in tokens if token.type == "fence"] == [
        'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, ".")\n'
    ]
    inline = [child.type for token in tokens for child in token.children or []]
    assert {"html_inline", "link_open", "image"}.isdisjoint(inline)
    assert {"html_block", "hr", "code_block", "blockquote_open"}.isdisjoint(token.type for token in tokens)
    assert [len(row) for row in table_rows(card, "Figures")] == [3, 3, 3, 3]


def test_card_of_a_merged_model_loads_it_with_transformers_and_names_what_was_trained_whole() -> None:
    rows = [(t.group, t.name, t.shape, t.dtype) for t in LORA.tensors]
    layout = Layout.of([*rows, ("model", "classifier.weight", (3, 4), "float32")])
    job = make_job(task={"name": "hf-sequence-classification", "model": "org/base"})
    what, _ = make_exportable(layout, job=job)
    card = model_card(what, form=Format.MERGED, with_plot=False)
    assert front_matter(card)["library_name"] == "transformers"
    assert dict(table_rows(card, "Method"))["trained whole"] == "`classifier.weight`"
    assert 'model = AutoModelForSequenceClassification.from_pretrained(".")' in card
    assert "A model trained by federated learning" in card
    weights = model_card(what, form=Format.WEIGHTS, with_plot=False)
    assert "library_name" not in front_matter(weights)
    assert 'tensors = load_file("model.safetensors")' in weights
