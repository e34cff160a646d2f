"""From rows of text to tensors.

A `Split` has one tensor of inputs, so padding is written into the token ids: `PADDING` stands for no token, and the
attention mask follows from it. Padding is on the right, up to a length that is the same for all, so that splits of
several clients can be joined; a batch is cut to its longest row before it reaches the model.

Shape legend: N examples, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fedclient.tasks.base import Split
from fedclient.tasks.hf.rows import Row

PADDING: Final = -1
IGNORED: Final = -100
"""A target that is not learned, as in transformers."""

_PLACE: Final = re.compile(r"\{([^{}]+)\}")


class Example(NamedTuple):
    """Token ids, and for each the same id or `IGNORED`; for a class, the class alone."""

    ids: list[int]
    targets: list[int]


def columns_in(*templates: str | None) -> list[str]:
    """Return the columns that stand in braces, each once."""
    return list(dict.fromkeys(column for template in templates if template for column in _PLACE.findall(template)))


def fill(template: str, row: Row) -> str:
    """Return `template` with each ``{column}`` replaced by the row's value; what the value holds stays as it is."""
    return _PLACE.sub(lambda place: row[place[1]], template)


def text_examples(tokenizer: Any, text: str, max_length: int, *, split: bool) -> Iterator[Example]:
    """Yield a text as examples of at most `max_length` tokens, of which every one but the first is learned.

    The tokenizer's end of text is added where it has one and does not add it itself.

    Args:
        tokenizer: of transformers.
        text: any text.
        max_length: T at most.
        split: whether a longer text becomes several examples; else it is cut.
    """
    ids = _with_end(tokenizer, tokenizer(text)["input_ids"])
    for start in range(0, len(ids) if split else 1, max_length):
        part = ids[start : start + max_length]
        if len(part) > 1:
            yield Example(part, part)


def completion_examples(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Iterator[Example]:
    """Yield prompt and completion as one example of which the completion alone is learned; a longer one is cut.

    None comes if nothing is left to learn.
    """
    before = tokenizer(prompt)["input_ids"]
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    learned = _with_end(tokenizer, tokenizer(completion, add_special_tokens=False)["input_ids"])
    ids = (before + learned)[:max_length]
    targets = ([IGNORED] * len(before) + learned)[:max_length]
    if any(target != IGNORED for target in targets[1:]):
        yield Example(ids, targets)


def class_examples(tokenizer: Any, text: str, label: int, max_length: int) -> Iterator[Example]:
    """Yield a text with its class; a longer one is cut, and none comes of a text without tokens."""
    if ids := tokenizer(text, truncation=True, max_length=max_length)["input_ids"]:
        yield Example(ids, [label])


def to_split(examples: Sequence[Example], max_length: int, *, has_class: bool) -> Split:
    """Return inputs (N × `max_length`) and targets: N × `max_length`, or N classes."""
    inputs = torch.full((len(examples), max_length), PADDING, dtype=torch.int32)
    targets = torch.full((len(examples), 1 if has_class else max_length), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        inputs[row, : len(example.ids)] = torch.tensor(example.ids, dtype=torch.int32)
        targets[row, : len(example.targets)] = torch.tensor(example.targets)
    return Split(inputs, targets.squeeze(1) if has_class else targets)


def lengths_of(inputs: Tensor) -> Tensor:
    """Return how many tokens each row has."""
    return (inputs != PADDING).sum(dim=1)


def as_batch(inputs: Tensor, pad_token: int) -> dict[str, Tensor]:
    """Return a model's arguments, as long as the longest row."""
    ids = inputs[:, : int(lengths_of(inputs).max())].long()
    mask = ids != PADDING
    return {"input_ids": ids.masked_fill(~mask, pad_token), "attention_mask": mask.long()}


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
