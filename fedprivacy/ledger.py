"""Who has released what: one history for each who was in it, and the guarantee that the one with most of them has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from fedprivacy.accountant import guarantee
from fedprivacy.events import History, Release
from fedprivacy.guarantee import Guarantee

MAX_LOSSES: Final = 8
"""Histories whose privacy loss distributions are tried, a second each; the bound of others is a little looser."""
_cached = lru_cache(maxsize=4096)(guarantee)


@dataclass
class Ledger:
    """Releases by name of who took part; grows only.

    Attributes:
        empty: the history of nothing: unit, adjacency, trust.
    """

    empty: History
    _histories: dict[str, History] = field(default_factory=dict)

    def add(self, names: Iterable[str], release: Release) -> None:
        """Note that each of `names` has released this."""
        after: dict[History, History] = {}
        for name in names:
            before = self._histories.get(name, self.empty)
            self._histories[name] = after.setdefault(before, before.then(release))

    def of(self, name: str) -> History:
        """Return all that one of them has released."""
        return self._histories.get(name, self.empty)

    def worst(self, delta: float, names: Collection[str] | None = None, then: History | None = None) -> Guarantee:
        """Return the guarantee of who has released most, so that it holds for all.

        Args:
            delta: of the guarantee.
            names: of these alone; None: of all who have released anything.
            then: what each of them is to release yet.

        Raises:
            InvalidInput, ConfigError: see `fedprivacy.accountant.guarantee`.
        """
        known = self._histories.values() if names is None else [self.of(name) for name in names]
        histories = {_with(each, then) for each in set(known)} or {_with(self.empty, then)}
        undominated = [one for one in histories if not any(_is_within(one, other) for other in histories)]
        by_rdp = {each: _cached(each, delta, with_pld=False) for each in undominated}
        worst: Guarantee | None = None
        for number, history in enumerate(sorted(by_rdp, key=lambda each: by_rdp[each].epsilon, reverse=True)):
            if worst is not None and by_rdp[history].epsilon <= worst.epsilon:
                break  # by loss distributions it would be no more
            found = _cached(history, delta) if number < MAX_LOSSES else by_rdp[history]
            worst = found if worst is None or found.epsilon > worst.epsilon else worst
        assert worst is not None
        return worst


def _with(history: History, then: History | None) -> History:
    for release in () if then is None else then.releases:
        history = history.then(release)
    return history.ordered()


def _is_within(one: History, other: History) -> bool:
    """Whether `other` has all that `one` has, and more."""
    counts = {each.once(): each.count for each in other.releases}
    return one != other and all(counts.get(each.once(), 0) >= each.count for each in one.releases)
