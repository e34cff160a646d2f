"""Checks a plugin's parameters, which arrive as plain values, against the plugin's own pydantic model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcore.errors import InvalidInput
from fedcore.validation import problems_of


class Params(BaseModel):
    """Base of every plugin's parameters: frozen, unknown keys are errors, no NaN.

    Used as it is, it says that a plugin has no parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ParamsT = TypeVar("ParamsT", bound=Params)


def parse_params(model: type[ParamsT], values: Mapping[str, object], where: str, *, strict: bool = True) -> ParamsT:
    """Return `values` as `model`.

    Args:
        model: what the plugin declares.
        values: the parameters, as read from a job file or a command line.
        where: key path of `values`, put before each problem: ``"task"`` gives ``"task.partition.kind: …"``.
        strict: whether the types must be exact; False for text from a command line, where ``"5"`` is a
            number.

    Raises:
        InvalidInput: with every problem: key path, value, and what would be right; an unknown key names the
            nearest.
    """
    try:
        return model.model_validate(dict(values), strict=strict)
    except ValidationError as error:
        raise InvalidInput("; ".join(problems_of(error, model, dict(values), where))) from error
