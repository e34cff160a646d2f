"""Small transformers of known architectures, a tokenizer with a token for each byte, and rows of text to learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fedclient.tasks.hf.docstrings import byte_tokenizer, make_model, save

MOODS = {"good": "a fine and happy day", "bad": "no, it was dull and sad"}


def save_llama(folder: Path) -> Path:
    save(folder, make_model(hidden_size=32, intermediate_size=64, num_hidden_layers=2), byte_tokenizer())
    return folder


def save_gpt2(folder: Path) -> Path:
    config = GPT2Config(
        vocab_size=258, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1
    )
    save(folder, seeded(lambda: GPT2LMHeadModel(config)), byte_tokenizer())
    return folder


def save_bert(folder: Path) -> Path:
    sizes: dict[str, Any] = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, pad_token_id=0)
    # Without its head: a checkpoint that was made for something else.
    save(folder, seeded(lambda: BertForSequenceClassification(config)).bert, byte_tokenizer())
    return folder


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return make()


def mood_rows(number: int) -> list[dict[str, Any]]:
    """Return rows with columns text, label (one of two), place (one of five) and number."""
    rows = []
    for index in range(number):
        label = "good" if index % 3 else "bad"
        text = f"{index}: {MOODS[label]}"
        rows.append({"text": text, "label": label, "place": f"town {index % 5}", "number": index})
    return rows


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
