"""The small language model that is made here, and the example job that fine-tunes it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclient.tasks.hf import docstrings
from fedcore.jobfile import Job, load_job
from fedsim.simulation import make_clients, simulate

EXAMPLE = Path(__file__).parents[4] / "examples" / "hf-docstrings.toml"
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


def test_federated_fine_tuning_of_the_pre_trained_model_lowers_the_loss(
    texts: dict[str, list[str]], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen, held_out = docstrings.divide(texts)
    model = docstrings.make_model(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    losses = docstrings.pretrain(model, TOKENIZER, {"argparse": (seen | held_out)["argparse"]}, 40)
    assert losses[-1] < losses[0] - 1
    docstrings.save(tmp_path / "model", model, TOKENIZER)
    docstrings.write_rows(tmp_path / "rows.jsonl", {module: own[:12] for module, own in held_out.items()})

    tree = load_job(EXAMPLE).model_dump()
    tree["job"]["rounds"] = 2
    job = Job.model_validate(tree)
    data = {"model": str(tmp_path / "model"), "path": str(tmp_path / "rows.jsonl"), "held_out": "0.3"}
    simulated = asyncio.run(simulate(job, make_clients(job, 4, data)))
    torch.set_num_threads(threads)
    first, *_, last = [row["evaluation"] for row in simulated.history]
    assert simulated.version.version == 2
    assert last["loss"] < first["loss"] - 0.02
    assert last["perplexity"] < first["perplexity"]
