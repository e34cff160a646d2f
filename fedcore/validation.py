"""Turns pydantic's findings into the lines that people read: key path, value, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from fedcore.names import nearest

MAX_PROBLEMS: Final = 20
"""Who made more mistakes sees the rest when these are mended."""


def problems_of(error: ValidationError, model: type[BaseModel], tree: Any, where: str = "") -> list[str]:
    """Return one line for every problem up to `MAX_PROBLEMS`, and one that counts the rest.

    Args:
        error: what validating raised.
        model: what `tree` was validated against; an unknown key names the nearest that this knows.
        tree: what was validated.
        where: key path of `tree`, put before each line: ``"task"`` gives ``"task.partition.kind: …"``.
    """
    items = error.errors(include_url=False)
    lines = [_problem(model, tree, where, item) for item in items[:MAX_PROBLEMS]]
    return lines if len(items) <= MAX_PROBLEMS else [*lines, f"and {len(items) - MAX_PROBLEMS} more problems"]


def _problem(model: type[BaseModel], tree: Any, where: str, item: Any) -> str:
    location, kind, text, value = item["loc"], item["type"], item["msg"], item["input"]
    path = ".".join([where] * bool(where) + _key_path(tree, location, missing=kind == "missing"))[:200] or "(all)"
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        guess = nearest(str(location[-1]), known)
        hint = f"did you mean {guess!r}? " if guess else ""
        return f"{path}: unknown key; {hint}known: {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{path}: is required"
    text = text.removeprefix("Value error, ")
    return f"{path}: {text}" if isinstance(value, Mapping) else f"{path}: {text}, got {_shown(value)}"


def _key_path(tree: Any, location: Sequence[str | int], *, missing: bool) -> list[str]:
    """Return `location` without pydantic's own words: inside a union it names the type of each value."""
    path: list[str] = []
    for part in location[:-1] if missing else location:
        if isinstance(part, int) if isinstance(tree, list) else isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
            path.append(_key(part))
    return [*path, str(location[-1])] if missing else path


def _key(part: str | int) -> str:
    """Return a key as it is written in a path; one that could end the line, or colour it, is quoted and escaped."""
    return str(part) if str(part).isprintable() else repr(part)


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:80])
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} too large to show"


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the keys of the model found by following `location` through nested models."""
    models = [model]
    for part in location:
        tagged = [each for each in models if _is_tagged(each, part)]
        found = models[0].model_fields.get(str(part))
        models = tagged or (_models_in(found.annotation) if found else []) or models
    return list(models[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]


def _is_tagged(model: type[BaseModel], tag: str | int) -> bool:
    """Whether this is the member of a union that pydantic's location names by its tag."""
    return any(tag in get_args(field.annotation) for field in model.model_fields.values())
