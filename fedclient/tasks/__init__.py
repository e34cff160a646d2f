"""Tasks: data, model, training and evaluation.

To add one, implement `base.Task` and list it here, or keep it in a file of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.registry import Registry

if TYPE_CHECKING:
    from fedclient.tasks.base import Task

TASKS: Registry[type[Task]] = Registry(
    "task",
    "roundtable.tasks",
    {
        "digits": "fedclient.tasks.digits.task:Digits",
        "hf-causal-lm": "fedclient.tasks.hf.causal_lm:HfCausalLm",
        "hf-sequence-classification": "fedclient.tasks.hf.classification:HfSequenceClassification",
    },
)
