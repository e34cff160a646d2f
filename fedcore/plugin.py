"""The base of every configured plugin: its fields are the parameters that a job file may give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import JsonValue

from fedcore.params import Params, parse_params


class Plugin(Params):
    """A plugin with its parameters: frozen, typed, checked as a whole, equal when the parameters are.

    A subclass sets `name` and declares its parameters as pydantic fields; one without parameters declares
    none.
    """

    name: ClassVar[str]

    @classmethod
    def configure(cls, params: Mapping[str, JsonValue]) -> Self:
        """Return the plugin with these parameters.

        Raises:
            InvalidInput: a parameter is unknown, missing or out of bounds; see `parse_params`.
        """
        return parse_params(cls, params, cls.name)

    def params(self) -> dict[str, JsonValue]:
        """Return every parameter, defaults included, such that ``configure(params())`` equals this plugin."""
        return self.model_dump(mode="json")
