"""The small language model that is made here, and the jobs in examples/lm that fine-tune it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclient.tasks.hf import docstrings
from fedcore.jobfile import Job, load_job
from fedserver.rounds.plan import make_plan
from fedsim.simulation import make_clients, simulate

FOLDER = Path(__file__).parents[4] / "examples" / "lm"
FOLDERS = (FOLDER, FOLDER / "wide", FOLDER / "one-round")
JOBS = [path for folder in FOLDERS for path in sorted(folder.glob("*.toml"))]
TOKENIZER = docstrings.byte_tokenizer()


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return docstrings.docstrings()


@given(st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda text: "<" not in text))
def test_each_byte_is_a_token_and_comes_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_docstrings_are_those_of_the_standard_library(texts: dict[str, list[str]]) -> None:
    import argparse

    assert argparse.ArgumentParser.parse_known_args.__doc__ is None
    assert any(text.startswith("Object for parsing command line strings") for text in texts["argparse"])
    assert "test" not in texts
    assert min(map(len, texts.values())) >= docstrings.MIN_DOCSTRINGS


def test_held_out_modules_are_an_eighth_and_in_no_pre_training(texts: dict[str, list[str]]) -> None:
    seen, held_out = docstrings.divide(texts)
    assert seen | held_out == texts
    assert not seen.keys() & held_out.keys()
    assert len(held_out) == len(texts) // 8


@pytest.fixture(scope="module")
def made(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return data options with a smaller model and less text than the command makes."""
    folder = tmp_path_factory.mktemp("docstrings")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _, held_out = docstrings.divide(texts)
    model = docstrings.make_model(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    losses = docstrings.pretrain(model, TOKENIZER, {"argparse": texts["argparse"]}, 120, 8e-3)
    torch.set_num_threads(threads)
    assert losses[-1] < losses[0] - 1
    docstrings.save(folder / "model", model, TOKENIZER)
    docstrings.write_rows(folder / "rows.jsonl", {module: own[:12] for module, own in held_out.items()})
    return {"model": str(folder / "model"), "path": str(folder / "rows.jsonl"), "held_out": "0.3"}


@pytest.mark.parametrize(
    ("recipe", "millions"), [(docstrings.NARROW, 0.5), (docstrings.WIDE, 2.6)], ids=["narrow", "wide"]
)
def test_models_are_as_large_as_is_said(recipe: docstrings.Recipe, millions: float) -> None:
    model = docstrings.make_model(**recipe.sizes)
    assert sum(values.numel() for values in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_each_example_lowers_the_loss_of_the_pre_trained_model(path: Path, made: dict[str, str]) -> None:
    tree = load_job(path).model_dump()
    tree["adapter"]["rank"] = 8  # of the smaller model's matrices
    job = Job.model_validate(tree)
    threads = torch.get_num_threads()
    simulated = asyncio.run(simulate(job, make_clients(job, job.schedule.cohort, made)))
    torch.set_num_threads(threads)
    first, *_, last = [row["evaluation"] for row in simulated.history]
    assert simulated.version.version == job.job.rounds
    assert last["loss"] < first["loss"] - 0.03
    assert last["perplexity"] < first["perplexity"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_examples_train_alike_and_a_start_from_gradients_takes_a_round_more(folder: Path) -> None:
    """Methods are compared, so that nothing else may differ."""

    def rest(path: Path) -> dict[str, Any]:
        tree = load_job(path).model_dump(mode="json")
        tree["job"]["rounds"] -= tree["adapter"]["name"] == "lora-sb"
        del tree["adapter"], tree["job"]["name"], tree["job"]["description"], tree["training"]["learning_rate"]
        del tree["aggregator"]["rule"]
        return tree

    jobs = [path for path in JOBS if path.parent == folder]
    assert len(jobs) >= 2
    assert all(rest(path) == rest(jobs[0]) for path in jobs)
    assert [make_plan(load_job(path), str(path)).job.job.name for path in jobs] == [path.stem for path in jobs]
