"""Virtual time: it stands still while anybody works, and jumps to the next alarm when nobody does."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

QUIET_PASSES: Final = 50
"""How many passes of the event loop without a sign of life count as "nobody has anything to do"."""


class VirtualClock:
    """A `fedcore.clock.Clock` for one event loop. Nothing moves it but `run`.

    Args:
        wall_s: what `wall_s` shows at the start.
    """

    def __init__(self, wall_s: float = 0.0) -> None:
        self._start_wall_s = wall_s
        self._now_s = 0.0
        self._alarms: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._num_working = 0
        self._signs_of_life = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def now_s(self) -> float:
        """See `Clock.now_s`."""
        return self._now_s

    def wall_s(self) -> float:
        """See `Clock.wall_s`."""
        return self._start_wall_s + self._now_s

    async def sleep(self, seconds: float) -> None:
        """See `Clock.sleep`."""
        self._signs_of_life += 1
        alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._alarms, (self._now_s + max(0.0, seconds), next(self._order), alarm))
        await alarm

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `Clock.working`."""
        self._signs_of_life += 1
        self._num_working += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_working -= 1
            if self._num_working == 0:
                self._idle.set()

    async def run(self) -> None:
        """Move time until cancelled."""
        while True:
            await self._idle.wait()
            if not await self._quiet():
                continue
            while self._alarms and self._alarms[0][2].done():  # cancelled sleepers
                heapq.heappop(self._alarms)
            if not self._alarms:
                await asyncio.sleep(0)
                continue
            time_s, _, alarm = heapq.heappop(self._alarms)
            self._now_s = max(self._now_s, time_s)
            alarm.set_result(None)

    async def _quiet(self) -> bool:
        """Whether nobody starts to work while everything that is ready to run gets its turn.

        A message on its way from one task to another is not marked as work; it is delivered within these passes.
        """
        before = self._signs_of_life
        for _ in range(QUIET_PASSES):
            await asyncio.sleep(0)
            if self._num_working or self._signs_of_life != before:
                return False
        return True
