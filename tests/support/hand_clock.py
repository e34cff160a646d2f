"""A clock that stands still until the test moves it on."""

from __future__ import annotations

import asyncio

from fedcore.clock import SystemClock


class HandClock(SystemClock):
    """Monotonic time by hand; the wall clock is the machine's."""

    def __init__(self) -> None:
        self._now_s = 1000.0
        self._sleepers: dict[asyncio.Future[None], tuple[float, int]] = {}  # when due, and which sleep it is
        self.num_sleeps = 0
        self._news = asyncio.Condition()

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        woken = asyncio.get_running_loop().create_future()
        self.num_sleeps += 1
        self._sleepers[woken] = self._now_s + seconds, self.num_sleeps
        try:
            async with self._news:
                self._news.notify_all()
            await woken
        finally:
            del self._sleepers[woken]

    def advance(self, seconds: float) -> None:
        """Move on, and wake whoever has slept enough."""
        self._now_s += seconds
        for woken, (due_s, _) in self._sleepers.items():
            if due_s <= self._now_s and not woken.done():
                woken.set_result(None)

    async def wait_for_sleepers(self, seconds: float, number: int = 1, after: int = 0) -> None:
        """Return when `number` callers sleep that would wake in `seconds`; sleeps up to number `after` do not count."""
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(lambda: self._num_sleeping(seconds, after) >= number)

    def _num_sleeping(self, seconds: float, after: int) -> int:
        return sum(
            abs(due_s - self._now_s - seconds) < 1e-6 and sleep > after for due_s, sleep in self._sleepers.values()
        )
