"""The assignments that a client has in hand, from their receipt to their outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final

from fedcore.clock import Clock
from fedcore.messages import Assignment, UploadState

MAX_IN_HAND: Final = 64


@dataclass(eq=False)
class Entry:
    """One assignment.

    Attributes:
        deadline_s: on the client's clock.
        stop: tells local training to end.
        progress: 0 to 1; written by the worker thread, read by the heartbeat.
        task: what works on it; None while it waits for its turn.
    """

    assignment: Assignment
    deadline_s: float
    stop: threading.Event = field(default_factory=threading.Event)
    progress: float = 0.0
    task: asyncio.Task[UploadState] | None = None

    def set_progress(self, part: float) -> None:
        """Note how much is done; called on the worker thread."""
        self.progress = part


class InHand:
    """A queue of assignments of which the first is worked on. Used on the event loop only.

    While it is not empty, a block of `Clock.working` is open: virtual time stands still for the client's work, but
    runs when that work waits for the server (`waiting`).
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._filled = asyncio.Event()
        self._working: AbstractContextManager[None] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Assignment ids, the first being worked on."""
        return tuple(self._entries)

    @property
    def current(self) -> Entry | None:
        """The first entry."""
        return next(iter(self._entries.values()), None)

    def get(self, assignment_id: str) -> Entry | None:
        """Return the entry if it is in hand."""
        return self._entries.get(assignment_id)

    def add(self, assignment: Assignment) -> None:
        """Put an assignment at the end; the caller has seen to it that it is new and that there is room."""
        deadline_s = self._clock.now_s() + assignment.deadline_s
        self._entries[assignment.assignment_id] = Entry(assignment, deadline_s)
        self._filled.set()
        self._set_working(True)

    def remove(self, assignment_id: str) -> None:
        """Take an entry out, whatever became of it."""
        self._entries.pop(assignment_id, None)
        if not self._entries:
            self._filled.clear()
            self._set_working(False)

    async def first(self) -> Entry:
        """Wait for an entry and return the first."""
        while (entry := self.current) is None:
            await self._filled.wait()
        return entry

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let virtual time run within the block. One block at a time."""
        self._set_working(False)
        try:
            yield
        finally:
            self._set_working(bool(self._entries))

    def _set_working(self, wanted: bool) -> None:
        if wanted and self._working is None:
            self._working = self._clock.working()
            self._working.__enter__()
        elif not wanted and self._working is not None:
            block, self._working = self._working, None
            block.__exit__(None, None, None)
