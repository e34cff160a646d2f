"""Checks a plugin's parameters, which arrive as plain values, against the plugin's own pydantic model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcore.errors import InvalidInput
from fedcore.names import nearest


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
        lines = [
            _problem(model, where, item["loc"], item["type"], item["msg"], item["input"]) for item in error.errors()
        ]
        raise InvalidInput("; ".join(lines)) from error


def _problem(
    model: type[Params], where: str, location: Sequence[str | int], kind: str, text: str, value: object
) -> str:
    path = ".".join(str(part) for part in (where, *location))
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        guess = nearest(str(location[-1]), known)
        hint = f"did you mean {guess!r}? " if guess else ""
        return f"{path}: unknown key; {hint}known: {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{path}: is required"
    text = text.removeprefix("Value error, ")
    return f"{path}: {text}" if isinstance(value, Mapping) else f"{path}: {text}, got {str(value)[:80]!r}"


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the keys of the model found by following `location` through nested models."""
    for part in location:
        found = model.model_fields.get(str(part))
        inner = _model_in(found.annotation) if found else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
