"""Virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedsim.clock import VirtualClock


@asynccontextmanager
async def moving(clock: VirtualClock) -> AsyncIterator[None]:
    task = asyncio.create_task(clock.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_sleepers_wake_in_the_order_of_their_alarms_and_no_real_time_passes() -> None:
    clock = VirtualClock(wall_s=1000.0)
    woken: list[tuple[str, float]] = []

    async def sleep(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now_s()))

    async with moving(clock):
        await asyncio.gather(sleep("year", 3e7), sleep("hour", 3600), sleep("day", 86400))
    assert woken == [("hour", 3600), ("day", 86400), ("year", 3e7)]
    assert clock.wall_s() == 1000.0 + 3e7


async def test_time_stands_still_while_anybody_works() -> None:
    clock = VirtualClock()
    release = asyncio.Event()
    seen: list[float] = []

    async def work() -> None:
        with clock.working():
            loop = asyncio.get_running_loop()
            # Real work on a thread, which the event loop cannot see.
            await loop.run_in_executor(None, lambda: None)
            await release.wait()
            seen.append(clock.now_s())

    async with moving(clock):
        worker = asyncio.create_task(work())
        sleeper = asyncio.create_task(clock.sleep(5))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not sleeper.done()
        release.set()
        await sleeper
        await worker
    assert seen == [0.0]
    assert clock.now_s() == 5.0


async def test_a_cancelled_sleeper_does_not_move_time() -> None:
    clock = VirtualClock()
    async with moving(clock):
        sleeper = asyncio.create_task(clock.sleep(1))
        await asyncio.sleep(0)
        sleeper.cancel()
        await clock.sleep(3)
    assert clock.now_s() == 3.0
