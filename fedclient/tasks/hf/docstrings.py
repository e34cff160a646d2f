"""Makes a small language model and text for it from what every machine has: Python's own documentation strings.

`python -m fedclient.tasks.hf.docstrings FOLDER` pre-trains a byte-level Llama on seven of eight modules of the standard
library and writes `FOLDER/model`; the docstrings of the others go to `FOLDER/held-out.jsonl`, one a line with its
module, for the jobs in `examples/lm`. That takes two to three minutes of one core. With `--wide` it is the
model and text of `examples/lm/wide`, in about six.

The text, and with it the model, follows the version of Python. Nothing is imported to be read.

Shape legend: N windows, T tokens.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

SEED: Final = 7
BATCH_SIZE: Final = 16
WINDOW: Final = 128
"""Tokens that the model is trained on at a time."""

MIN_DOCSTRINGS: Final = 8
"""Of a module; one with fewer is left out."""


class Recipe(NamedTuple):
    """A model, its pre-training, and how much is held out.

    Attributes:
        sizes: keys of `LlamaConfig`.
        steps: of pre-training.
        learning_rate: its greatest.
        docstrings: that are kept of a held-out module, the first ones; None for all.
    """

    sizes: Mapping[str, int]
    steps: int
    learning_rate: float
    docstrings: int | None


NARROW: Final = Recipe(
    {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    steps=1000,
    learning_rate=4e-3,
    docstrings=None,
)
"""0.5 million parameters."""

WIDE: Final = Recipe(
    {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    steps=500,
    learning_rate=2e-3,
    docstrings=24,
)
"""2.6 million parameters, in matrices four times as wide and a single layer."""

_LEFT_OUT: Final = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token for each byte, one for padding and one for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1}
    vocabulary |= {symbol: 2 + byte for byte, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )


def make_model(seed: int = SEED, **sizes: int) -> Any:
    """Return a Llama with fresh weights.

    Args:
        seed: of the weights.
        sizes: keys of `LlamaConfig` in place of those of `NARROW`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    ours: dict[str, Any] = {
        **NARROW.sizes,
        "vocab_size": 258,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**ours | sizes))


def docstrings() -> dict[str, list[str]]:
    """Return the docstrings of each top-level module or package of the standard library, in the order of names."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.intersection(parts):
            found.setdefault(parts[0], []).extend(_docstrings_in(file))
    return {module: texts for module, texts in sorted(found.items()) if len(texts) >= MIN_DOCSTRINGS}


def divide(texts: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the modules to pre-train on, and every eighth, which is held out."""
    held_out = set(list(texts)[7::8])
    return (
        {module: own for module, own in texts.items() if module not in held_out},
        {module: own for module, own in texts.items() if module in held_out},
    )


def pretrain(
    model: Any, tokenizer: Any, texts: Mapping[str, list[str]], steps: int, learning_rate: float
) -> list[float]:
    """Train `model` in place on random windows of all `texts`; return the loss of each step."""
    end = [tokenizer.eos_token_id]
    ids = [token for own in texts.values() for text in own for token in tokenizer(text)["input_ids"] + end]
    stream = torch.tensor(ids)
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(stream) - WINDOW, (BATCH_SIZE,), generator=generator)
        batch_NT = stream[starts[:, None] + torch.arange(WINDOW)]
        optimizer.zero_grad()
        loss = model(input_ids=batch_NT, labels=batch_NT, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write model and tokenizer as `from_pretrained` reads them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(file: Path, texts: Mapping[str, list[str]]) -> None:
    """Write one line of JSON for each docstring, with its module."""
    with file.open("w", encoding="utf-8") as lines:
        for module, own in texts.items():
            lines.writelines(json.dumps({"module": module, "text": text}) + "\n" for text in own)


def main() -> None:
    """Make model and text."""
    parser = argparse.ArgumentParser(description="Make a small language model and text for it.")
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--wide", action="store_true", help="one layer of 512 in place of three of 128, and less text")
    parser.add_argument("--steps", type=int, help="of pre-training (default: 1000, with --wide 500)")
    options = parser.parse_args()
    folder: Path = options.folder
    torch.set_num_threads(1)
    recipe = WIDE if options.wide else NARROW
    seen, held_out = divide(docstrings())
    held_out = {module: own[: recipe.docstrings] for module, own in held_out.items()}
    tokenizer, model = byte_tokenizer(), make_model(**recipe.sizes)
    losses = pretrain(model, tokenizer, seen, options.steps or recipe.steps, recipe.learning_rate)
    save(folder / "model", model, tokenizer)
    write_rows(folder / "held-out.jsonl", held_out)
    sys.stdout.write(
        f"{folder}: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats a byte on {len(seen)} modules;"
        f" {len(held_out)} modules held out\n"
    )


def _docstrings_in(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 16:
                yield text


if __name__ == "__main__":
    main()
