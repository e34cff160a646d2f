"""How long a caller may take to send: a call that nobody feeds is not held open for ever.

Time runs on the server's clock, and only while the server waits for the caller. Who is too slow gets `Unreachable`: an
honest client on a bad line tries again and goes on from where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Generic, Self, TypeVar

from fedcore.clock import Clock
from fedcore.errors import Unreachable
from fedcore.messages import CHUNK_BYTES
from fedserver.rounds.alarm import Alarm

FIRST_MESSAGE_S: Final = 30.0
"""From the start of a call to its first message, whole. As long as a client waits for an answer."""
PROGRESS_S: Final = 60.0
"""From one `PROGRESS_BYTES` of an upload to the next: twice what our clients allow themselves for a chunk."""
PROGRESS_BYTES: Final = CHUNK_BYTES

T = TypeVar("T")


async def first_message(requests: AsyncIterator[T], clock: Clock) -> T | None:
    """Return the first message of a call; None if its caller has closed it without any.

    Raises:
        Unreachable: it did not come within `FIRST_MESSAGE_S`.
    """
    async with _patience(clock, FIRST_MESSAGE_S, f"no message within {FIRST_MESSAGE_S:g} s"):
        return await anext(requests, None)


class Flow(Generic[T]):
    """The messages of an upload, as long as it comes along. Who reads them says how much they brought."""

    def __init__(self, requests: AsyncIterator[T], clock: Clock) -> None:
        self._requests, self._clock = requests, clock
        self._left_s, self._missing = PROGRESS_S, PROGRESS_BYTES

    def brought(self, num_bytes: int) -> None:
        """Count what the last message brought."""
        self._missing -= num_bytes
        if self._missing <= 0:
            self._left_s, self._missing = PROGRESS_S, PROGRESS_BYTES

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Return the next message.

        Raises:
            Unreachable: `PROGRESS_BYTES` took longer than `PROGRESS_S`, however they were cut.
        """
        waiting_since_s = self._clock.now_s()
        async with _patience(self._clock, self._left_s, f"less than {PROGRESS_BYTES} bytes within {PROGRESS_S:g} s"):
            request = await anext(self._requests)
        self._left_s -= self._clock.now_s() - waiting_since_s
        return request


@asynccontextmanager
async def _patience(clock: Clock, seconds: float, text: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(None) as limit:
            alarm = Alarm(clock, lambda: limit.reschedule(0))
            alarm.set(clock.now_s() + seconds)
            try:
                yield
            finally:
                alarm.set(None)
    except TimeoutError as error:
        raise Unreachable(text) from error
