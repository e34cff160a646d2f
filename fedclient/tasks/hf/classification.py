"""The task `hf-sequence-classification`: a transformer learns which class a text is of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from fedclient.tasks.hf.encoding import Example, class_examples, columns_in, fill
from fedclient.tasks.hf.models import Head
from fedclient.tasks.hf.rows import Row
from fedclient.tasks.hf.task import HfParams, HfTask
from fedcore.errors import InvalidInput


class ClassificationParams(HfParams):
    """Keys of `[task]`."""

    label: str = Field(default="label", min_length=1, description="Column of the class.")
    labels: list[str] = Field(
        min_length=2, max_length=10_000, description="The column's values, class 0 first: the same for all clients."
    )


class HfSequenceClassification(HfTask):
    """Learns classes of texts. Metrics: accuracy and loss. A head that the model lacks starts from the job's seed."""

    name: ClassVar[str] = "hf-sequence-classification"
    head: ClassVar[Head] = "sequence-classification"
    params: ClassificationParams

    @property
    def columns(self) -> list[str]:
        """See `HfTask.columns`."""
        return [*columns_in(self.params.text), self.params.label]

    @property
    def model_config(self) -> dict[str, Any]:
        """See `HfTask.model_config`."""
        names = dict(enumerate(self.params.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def examples(self, tokenizer: Any, row: Row) -> Iterator[Example]:
        """See `HfTask.examples`."""
        params = self.params
        value = row[params.label]
        if value not in params.labels:
            raise InvalidInput(f"a label is none of task.labels, {', '.join(params.labels[:20])}")
        return class_examples(tokenizer, fill(params.text, row), params.labels.index(value), params.max_length)

    def align(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of each text, and its class."""
        return outputs.float(), targets
