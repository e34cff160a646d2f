"""One alarm on a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fedcore.clock import Clock


class Alarm:
    """Calls `ring` once at the time set last. Used on the event loop's thread."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._task: asyncio.Task[None] | None = None
        self._time_s: float | None = None

    def set(self, time_s: float | None) -> None:
        """Ring at `time_s` on the clock, or never; the time set before is forgotten."""
        if time_s == self._time_s:
            return
        self._time_s = time_s
        if self._task is not None:
            self._task.cancel()
        self._task = None if time_s is None else asyncio.create_task(self._wait(time_s))

    async def _wait(self, time_s: float) -> None:
        await self._clock.sleep(max(0.0, time_s - self._clock.now_s()))
        self._time_s = None
        self._ring()
