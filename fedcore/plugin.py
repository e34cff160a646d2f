"""The base of every configured plugin: its fields are the parameters that a job file may give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from fedcore.errors import InvalidInput
from fedcore.names import nearest


class Plugin(BaseModel):
    """A plugin with its parameters: frozen, typed, checked as a whole, equal when the parameters are.

    A subclass sets `name` and declares its parameters as pydantic fields; one without parameters declares
    none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    name: ClassVar[str]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the plugin with these parameters.

        Raises:
            InvalidInput: a parameter is unknown, missing or out of bounds; the text has one clause for
                every problem and, for an unknown one, the nearest known.
        """
        try:
            return cls.model_validate(dict(params))
        except ValidationError as error:
            problems = "; ".join(
                cls._problem(".".join(map(str, item["loc"])), item["type"], item["msg"], item["input"])
                for item in error.errors()
            )
            raise InvalidInput(f"{cls.name}: {problems}") from error

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter, defaults included, such that ``configure(params())`` equals this plugin."""
        return self.model_dump(mode="json")

    @classmethod
    def _problem(cls, key: str, kind: str, text: str, value: object) -> str:
        known = list(cls.model_fields)
        if kind == "extra_forbidden":
            guess = nearest(key, known)
            hint = f"did you mean {guess!r}? " if guess else ""
            return f"unknown parameter {key!r}: {hint}known: {', '.join(known) or 'none'}"
        if kind == "missing":
            return f"parameter {key!r} is required"
        text = text.removeprefix("Value error, ")
        return f"parameter {key!r}: {text}, got {str(value)[:80]!r}" if key else text
