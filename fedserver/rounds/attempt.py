"""One open attempt: what was assigned, what was accepted, and the running sum.

Runs on the event loop's thread, except `fold`, which works in a worker thread: `reading` is held while a whole frame is
read, so one update at a time is in memory, however many come at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedagg.base import Fold
from fedcore.errors import UpdateRejected, UpdateResult
from fedcore.messages import UpdateHeader, WorkKind
from fedserver.state.records import AssignmentRecord, AttemptRecord


@dataclass
class Attempt:
    """See the module's text.

    Attributes:
        record: the attempt as first journaled.
        opened_s: when, on the server's clock.
        assignments: by id, all that was handed out, as first journaled.
        ended: ids of assignments whose outcome is known.
        headers: of the accepted updates, by client.
        frames: digest of the accepted update's frame, by client.
        heard_of: ids of assignments of whose update a byte has come since the server's start.
        spools: uploads in chunks that have begun, by key, each with the lock that lets in one chunk at a time; what is
            unfinished is discarded with the attempt.
        fold: None when nothing is summed (INITIALISE, EVALUATE).
    """

    record: AttemptRecord
    opened_s: float
    fold: Fold | None
    assignments: dict[str, AssignmentRecord] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    headers: dict[str, UpdateHeader] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)
    heard_of: set[str] = field(default_factory=set)
    spools: dict[str, asyncio.Lock] = field(default_factory=dict)
    _sealed: bool = False
    _in_flight: int = 0
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def kind(self) -> WorkKind:
        """What was assigned."""
        return self.record.kind

    @property
    def version(self) -> int:
        """The base of TRAIN and EVALUATE; 0 for INITIALISE."""
        return self.record.version

    @property
    def is_sealed(self) -> bool:
        """Whether nothing new is let in."""
        return self._sealed

    @property
    def is_receiving(self) -> bool:
        """Whether an update is on its way into the journal or the sum."""
        return self._in_flight > 0

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
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing is on its way."""
        while self._in_flight:
            self._settled.clear()
            await self._settled.wait()

    def assignment_of(self, client: str) -> str | None:
        """Return the id of the client's assignment whose outcome is open."""
        for record in self.assignments.values():
            if record.client == client and record.assignment_id not in self.ended:
                return record.assignment_id
        return None

    def awaits(self, client: str, header: UpdateHeader) -> bool:
        """Whether the update that `header` announces is the open answer to one of this client's assignments."""
        record = self.assignments.get(header.assignment_id)
        return (
            record is not None
            and record.client == client
            and header.assignment_id not in self.ended
            and not self._sealed
        )

    def wants_layout(self, client: str) -> bool:
        """Whether this client was asked for the first version."""
        return self.kind is WorkKind.INITIALISE and any(row.client == client for row in self.assignments.values())

    def spool_of(self, client: str, update_id: str) -> str | None:
        """Return the key of an upload that the client has begun."""
        assignment_id = self.assignment_of(client)
        key = None if assignment_id is None else assignment_id + update_id
        return key if key in self.spools else None

    def unfinished(self) -> list[str]:
        """Return the clients whose assignments have no outcome yet."""
        return [record.client for key, record in self.assignments.items() if key not in self.ended]

    def accept(self, client: str, header: UpdateHeader, frame: str | None) -> None:
        """Note an update that is durable (and, where there is a fold, is in it or about to be)."""
        self.headers[client] = header
        if frame is not None:
            self.frames[client] = frame


@dataclass(frozen=True)
class Decliner:
    """A client that has declined work, and why."""

    client: str
    reason: str


def split_spool_key(key: str) -> tuple[str, str]:
    """Return the assignment id and the update id that an unfinished upload is named by."""
    return key[:32], key[32:]
