"""When to try again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np

from fedcore.clock import Clock
from fedcore.errors import Unreachable

FIRST_S: Final = 0.2
LIMIT_S: Final = 20.0


class Backoff:
    """Exponential back-off with full jitter: uniform between 0 and a cap that doubles up to `LIMIT_S`.

    Source: M. Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015. All clients lose their server in
    the same moment; the jitter keeps them from coming back in one.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._cap_s = FIRST_S

    def next_s(self) -> float:
        """Return how many seconds to wait now."""
        delay_s = float(self._rng.uniform(0.0, self._cap_s))
        self._cap_s = min(2 * self._cap_s, LIMIT_S)
        return delay_s

    def reset(self) -> None:
        """Start again from `FIRST_S`, because something worked."""
        self._cap_s = FIRST_S


class Retry:
    """Tries for one piece of work, up to its deadline.

    Args:
        clock: of the deadline.
        deadline_s: on `clock`.
        rng: for the jitter.
        pause: waits so many seconds, or less if there is news from the server.
        moved: is called when something did.
    """

    def __init__(
        self,
        clock: Clock,
        deadline_s: float,
        rng: np.random.Generator,
        pause: Callable[[float], Awaitable[None]],
        moved: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._deadline_s = deadline_s
        self._backoff = Backoff(rng)
        self._pause = pause
        self._moved = moved

    def progressed(self) -> None:
        """Note that something moved: the next failure is a new one."""
        self._backoff.reset()
        self._moved()

    async def wait(self, error: Unreachable) -> None:
        """Return when it is time to try again after `error`.

        Raises:
            Unreachable: the deadline comes before the next try would.
        """
        delay_s = self._backoff.next_s()
        if self._clock.now_s() + delay_s >= self._deadline_s:
            raise Unreachable(f"gave up at the deadline: {error}") from error
        await self._pause(delay_s)
