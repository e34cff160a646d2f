"""Named plugins: built-ins in a visible table, third-party ones by entry point."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Generic, TypeVar, cast

from fedcore.errors import InvalidInput, UnknownPlugin
from fedcore.names import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Finds plugins of one kind by name and imports them on first use.

    Args:
        kind: what the plugins are, for messages: ``"codec"``.
        group: entry point group for third parties: ``"roundtable.codecs"``.
        builtins: name → ``"module:attribute"``. Nothing is imported until asked for.

    A name can belong to one plugin only: an entry point that repeats a built-in or another entry point is an error,
    raised when that name is asked for. Names never come from the wire: a peer's job is checked against this table
    on the machine that runs it.
    """

    def __init__(self, kind: str, group: str, builtins: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtins = dict(builtins)
        self._added: dict[str, T] = {}

    def names(self) -> list[str]:
        """Return every known name, sorted."""
        return sorted({*self._builtins, *self._added, *self._installed().names})

    def add(self, name: str, plugin: T) -> None:
        """Register `plugin` in this process only, as a user's own task file does.

        Raises:
            InvalidInput: the name is taken.
        """
        if name in self.names():
            raise InvalidInput(f"{self.kind} {name!r} is registered already")
        self._added[name] = plugin

    def get(self, name: str) -> T:
        """Return the plugin called `name`.

        Raises:
            UnknownPlugin: there is none, and the text names the nearest and all known ones; or it is installed and
                cannot be loaded, and the text says what and why.
            InvalidInput: two installed plugins claim the name.
        """
        if name in self._added:
            return self._added[name]
        points = list(self._installed().select(name=name))
        if len(points) + (name in self._builtins) > 1:
            owners = ", ".join(point.value for point in points)
            raise InvalidInput(f"{self.kind} {name!r} is claimed more than once: {owners}")
        if points:
            return cast("T", self._load(points[0]))
        if name not in self._builtins:
            guess = nearest(name, self.names())
            hint = f"did you mean {guess!r}? " if guess else ""
            raise UnknownPlugin(f"unknown {self.kind} {name!r}: {hint}known: {', '.join(self.names())}")
        module, _, attribute = self._builtins[name].partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))

    def _installed(self) -> EntryPoints:
        return _entry_points(self.group, tuple(sys.path))

    def _load(self, point: EntryPoint) -> object:
        try:
            return point.load()
        except Exception as error:
            # Importing runs a third party's code, which may fail in any way; a daemon outlives it.
            reason = str(error).partition("\n")[0]
            raise UnknownPlugin(
                f"{self.kind} {point.name!r} is installed as {point.value!r} and cannot be loaded:"
                f" {type(error).__name__}: {reason}"
            ) from error


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Look through every distribution on `path`, which is `sys.path`; that takes milliseconds, so once."""
    return entry_points(group=group)
