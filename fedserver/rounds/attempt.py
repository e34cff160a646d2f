"""One open attempt: what was assigned, what was accepted, and the running sum.

Runs on the event loop's thread, except `fold`, which adds one update at a time in a worker thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedagg.base import Fold
from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.messages import UpdateHeader, WorkKind
from fedserver.state.base import AssignmentRecord


@dataclass
class Attempt:
    """See the module's text.

    Attributes:
        version: the base of TRAIN and EVALUATE; 0 for INITIALISE.
        assignments: by id, all that was handed out, as first journaled.
        ended: ids of assignments whose outcome is known.
        headers: of the accepted updates, by client.
        frames: digest of the accepted update's frame, by client.
        spools: keys of uploads in chunks that have begun; what is unfinished is discarded with the attempt.
        fold: None when nothing is summed (INITIALISE, EVALUATE).
    """

    kind: WorkKind
    version: int
    number: int
    opened_s: float
    fold: Fold | None
    assignments: dict[str, AssignmentRecord] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    headers: dict[str, UpdateHeader] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)
    spools: set[str] = field(default_factory=set)
    _sealed: bool = False
    _in_flight: int = 0
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    folding: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextmanager
    def receiving(self, assignment_id: str) -> Iterator[None]:
        """Hold the attempt open while one update is made durable and folded.

        So an upload that races with the close is either in the version or told that it is too late.

        Raises:
            UpdateRejected: the attempt has closed (TOO_LATE) or the assignment's outcome is known (DUPLICATE).
        """
        if self._sealed:
            raise UpdateRejected(UpdateResult.TOO_LATE, f"version {self.version} has closed")
        if assignment_id in self.ended:
            raise UpdateRejected(UpdateResult.DUPLICATE, "this assignment has an update already")
        self.ended.add(assignment_id)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._settled.set()

    async def seal(self) -> None:
        """Let nothing new in, and wait for what is on its way."""
        self._sealed = True
        while self._in_flight:
            self._settled.clear()
            await self._settled.wait()

    def assignment_of(self, client: str) -> str | None:
        """Return the id of the client's assignment whose outcome is open."""
        for record in self.assignments.values():
            if record.client == client and record.assignment_id not in self.ended:
                return record.assignment_id
        return None

    def unfinished(self) -> list[str]:
        """Return the clients whose assignments have no outcome yet."""
        return [record.client for key, record in self.assignments.items() if key not in self.ended]

    def accept(self, client: str, header: UpdateHeader, frame: str | None) -> None:
        """Note an update that is durable (and, where there is a fold, is in it or about to be)."""
        self.headers[client] = header
        if frame is not None:
            self.frames[client] = frame
