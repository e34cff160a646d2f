"""Who is connected, and with which work in hand.

Everything here runs on the event loop's thread and nothing awaits, so each call is atomic for every other one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from fedcore.errors import FedError, Refused
from fedcore.messages import Answer, Assignment, Cancel, Heartbeat, Hello


class Listener(Protocol):
    """A job that hears of clients."""

    def fits(self, hello: Hello) -> bool:
        """Whether a client that introduces itself so can work on this job."""
        ...

    def idle(self, client: str) -> None:
        """The client is connected and has nothing to do."""
        ...

    def busy(self, client: str, gone: bool) -> None:
        """The client took work from somebody, or is `gone`."""
        ...

    def returned(self, client: str) -> Assignment | None:
        """A client came (again): return the work that this job still expects of it, if any."""
        ...


@dataclass
class Seat:
    """One connected client.

    Attributes:
        work: the assignment that it has in hand, "" when idle.
        progress: of that work, 0 to 1, as last said.
        seen_s: when it last said anything, on the server's clock.
    """

    client: str
    hello: Hello
    work: str = ""
    progress: float = 0.0
    seen_s: float = 0.0
    _orders: asyncio.Queue[Assignment | Cancel | Answer | FedError | None] = field(default_factory=asyncio.Queue)

    def order(self, order: Assignment | Cancel | Answer) -> None:
        """Send an order, or an answer; it waits here until the client's stream takes it."""
        self._orders.put_nowait(order)

    @property
    def num_waiting(self) -> int:
        """How many orders and answers the client's stream has not taken yet."""
        return self._orders.qsize()

    def close(self, reason: FedError | None) -> None:
        """End the session after the orders before this; with a `reason` its reader gets that as an error."""
        self._orders.put_nowait(reason)

    async def orders(self) -> AsyncIterator[Assignment | Cancel | Answer]:
        """Yield orders as they come, until the session is closed.

        Raises:
            FedError: what `close` was given.
        """
        while (order := await self._orders.get()) is not None:
            if isinstance(order, FedError):
                raise order
            yield order
            del order  # not held while its client works


class Fleet:
    """The seats, and the jobs that compete for them."""

    def __init__(self) -> None:
        self._seats: dict[str, Seat] = {}
        self._jobs: list[Listener] = []

    @property
    def seats(self) -> dict[str, Seat]:
        """Connected clients by name; not to be changed."""
        return self._seats

    def add_job(self, job: Listener) -> None:
        """Let a job hear of clients, first of those that are here."""
        self._jobs.append(job)
        for seat in list(self._seats.values()):
            self._welcome(seat, [job])

    def remove_job(self, job: Listener) -> None:
        """A job has ended."""
        self._jobs.remove(job)

    def join(self, client: str, hello: Hello) -> Seat:
        """Seat a client that introduced itself. A second session of the same name ends the first one."""
        if (old := self._seats.get(client)) is not None:
            self.leave(old, Refused(f"client {client!r} opened another session"))
        seat = self._seats[client] = Seat(client, hello)
        self._welcome(seat, self._jobs)
        return seat

    def leave(self, seat: Seat, reason: FedError | None = None) -> bool:
        """End a session and return True; later calls for the same seat do nothing."""
        if self._seats.get(seat.client) is not seat:
            return False
        del self._seats[seat.client]
        seat.close(reason)
        for job in self._jobs:
            job.busy(seat.client, gone=True)
        return True

    def take(self, client: str, assignment_id: str) -> bool:
        """Reserve an idle client for an assignment; False if it is gone or another job was quicker."""
        seat = self._seats.get(client)
        if seat is None or seat.work:
            return False
        seat.work, seat.progress = assignment_id, 0.0
        for job in self._jobs:
            job.busy(client, gone=False)
        return True

    def order(self, client: str, assignment: Assignment) -> None:
        """Send the work that the client was taken for. If it has gone since, it hears of it when it returns."""
        seat = self._seats.get(client)
        if seat is not None and seat.work == assignment.assignment_id:
            seat.order(assignment)

    def release(self, client: str, assignment_id: str, reason: str = "") -> None:
        """The work is over: done, or with a `reason` no longer wanted, which the client is told. It is idle again."""
        seat = self._seats.get(client)
        if seat is None or seat.work != assignment_id:
            return
        seat.work, seat.progress = "", 0.0
        if reason:
            seat.order(Cancel(assignment_id, reason))
        # Whoever was asked first is asked last the next time, so that jobs share the clients.
        self._jobs = self._jobs[1:] + self._jobs[:1]
        self._offer(seat, self._jobs)

    def heartbeat(self, seat: Seat, beat: Heartbeat) -> None:
        """Note how far a client says it is."""
        if beat.assignment_id == seat.work:
            seat.progress = beat.progress if 0.0 <= beat.progress <= 1.0 else 0.0  # NaN too

    def _welcome(self, seat: Seat, jobs: list[Listener]) -> None:
        """Give a client the work that one of `jobs` still expects of it, or offer it to them all."""
        for job in jobs:
            expected = None if seat.work else job.returned(seat.client)
            if expected is not None:
                seat.work = expected.assignment_id
                if expected.assignment_id not in seat.hello.assignment_ids:
                    seat.order(expected)
        self._offer(seat, jobs)

    def _offer(self, seat: Seat, jobs: list[Listener]) -> None:
        for job in list(jobs):
            if not seat.work and job.fits(seat.hello):
                job.idle(seat.client)
