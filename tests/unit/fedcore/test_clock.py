from __future__ import annotations

import itertools

from fedcore.clock import Clock, SystemClock


def test_time_never_goes_back() -> None:
    clock: Clock = SystemClock()
    times = [clock.now_s() for _ in range(1000)]
    assert all(a <= b for a, b in itertools.pairwise(times))


def test_wall_time_is_seconds_since_1970() -> None:
    assert SystemClock().wall_s() > 1_700_000_000


async def test_sleep_returns_not_before_its_time() -> None:
    clock = SystemClock()
    begin_s = clock.now_s()
    await clock.sleep(0.001)
    assert clock.now_s() - begin_s >= 0.0009  # asyncio's loop may wake one clock resolution early


def test_working_blocks_nest_and_let_errors_through() -> None:
    clock = SystemClock()
    with clock.working(), clock.working():
        pass
