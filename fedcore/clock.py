"""Time as an interface: the daemon runs on the machine's clock, the simulator on a virtual one."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Clock(Protocol):
    """What the engine knows of time. Deadlines use `now_s` only, so a step of the wall clock moves no deadline."""

    def now_s(self) -> float:
        """Return seconds on a monotonic clock with an arbitrary zero."""
        ...

    def wall_s(self) -> float:
        """Return seconds since 1970 (UTC), for records and certificates, never for deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` on this clock."""
        ...

    def working(self) -> AbstractContextManager[None]:
        """Mark real work: while any such block is open, virtual time stands still."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        """See `Clock.now_s`."""
        return time.monotonic()

    def wall_s(self) -> float:
        """See `Clock.wall_s`."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See `Clock.sleep`."""
        await asyncio.sleep(seconds)

    def working(self) -> AbstractContextManager[None]:
        """See `Clock.working`: real time never stands still."""
        return nullcontext()
