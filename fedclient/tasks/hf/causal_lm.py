"""The task `hf-causal-lm`: a language model learns to go on with text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from fedclient.tasks.base import Split
from fedclient.tasks.hf.encoding import IGNORED, Example, columns_in, completion_examples, fill, text_examples
from fedclient.tasks.hf.models import Head
from fedclient.tasks.hf.rows import Row
from fedclient.tasks.hf.task import HfParams, HfTask


class CausalLmParams(HfParams):
    """Keys of `[task]`."""

    completion: str | None = Field(
        default=None,
        min_length=1,
        max_length=10_000,
        description="Template for what follows `text`; then this alone is learned.",
    )
    long_text: Literal["split", "cut"] = Field(
        default="split", description="What becomes of a text above `max_length`; with `completion` it is cut."
    )


class HfCausalLm(HfTask):
    """Learns each next token. Metrics: loss, perplexity (its exponential) and accuracy, over all tokens learned."""

    name: ClassVar[str] = "hf-causal-lm"
    head: ClassVar[Head] = "causal-lm"
    params: CausalLmParams

    @property
    def columns(self) -> list[str]:
        """See `HfTask.columns`."""
        return columns_in(self.params.text, self.params.completion)

    def examples(self, tokenizer: Any, row: Row) -> Iterator[Example]:
        """See `HfTask.examples`."""
        params = self.params
        text = fill(params.text, row)
        if params.completion is not None:
            return completion_examples(tokenizer, text, fill(params.completion, row), params.max_length)
        return text_examples(tokenizer, text, params.max_length, split=params.long_text == "split")

    def align(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores before each token that is learned, and that token."""
        following = targets[:, 1 : outputs.shape[1]]
        learned = following != IGNORED
        return outputs[:, : following.shape[1]][learned].float(), following[learned]

    def evaluate(self, model: nn.Module, data: Split) -> dict[str, float]:
        """See `HfTask.evaluate`."""
        metrics = super().evaluate(model, data)
        loss = metrics["loss"]
        return metrics | {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def _num_predicted(self, targets: Tensor) -> int:
        return int((targets[:, 1:] != IGNORED).sum())
