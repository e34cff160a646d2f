"""A client at work: one session with its server, kept up; and its assignments, done one after another.

Two tasks run side by side. The session task connects, hears orders, sends heartbeats, and connects again after every
break. The work task takes the assignments in the order of their arrival: download, compute (on the executor's thread),
upload. Work outlives the session: a server that goes away during local training gets the update when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedclient.backoff import Backoff, Retry
from fedclient.declining import Declined
from fedclient.guard import Guard
from fedclient.inhand import MAX_IN_HAND, Entry, InHand
from fedclient.residuals import Residuals
from fedclient.trainer import Stopped
from fedclient.transfer import Frames, deliver
from fedclient.transport.base import Session, Transport
from fedclient.updates import UpdateMaker
from fedclient.worker import Worker
from fedcore.clock import Clock
from fedcore.errors import FedError, Unauthenticated, Unreachable, UpdateResult
from fedcore.messages import Assignment, Cancel, Decline, Heartbeat, Hello, UploadState, WorkKind

GOODBYE_S: Final = 5.0
"""What a stopping client waits at most for its last words to be sent."""

_T = TypeVar("_T")
_log: Final = logging.getLogger(__name__)


class ClientRunner:
    """One client, from its first connection to `stop`.

    `run` and `stop` belong to one event loop. `worker` is only ever used on `executor`, one call at a time.

    Args:
        transport: the way to the server; the caller closes it.
        worker: trains and evaluates.
        signing_key: signs updates.
        about: how to introduce this client; `assignment_ids` is filled in here.
        clock: for deadlines, heartbeats and back-off.
        executor: where `worker` computes.
        rng: jitter of the back-off, nothing else.
        residuals: keeps what encoding leaves out, for jobs with error feedback; used as `worker` is.
        guard: refuses work, and notes what is released; used as `worker` is.
    """

    def __init__(
        self,
        transport: Transport,
        worker: Worker,
        signing_key: Ed25519PrivateKey,
        *,
        about: Hello,
        clock: Clock,
        executor: Executor,
        rng: np.random.Generator,
        residuals: Residuals,
        guard: Guard,
    ) -> None:
        self._transport = transport
        self._about = about
        self._clock = clock
        self._executor = executor
        self._rng = rng
        self._maker = UpdateMaker(worker, signing_key, transport.federation, transport.client, residuals, guard)
        self._frames = Frames(transport)
        self._hand = InHand(clock)
        self._stopping = asyncio.Event()
        self._session: Session | None = None
        self._backoff = Backoff(rng)
        self._contact = _Signal()
        self._declines: asyncio.Queue[Decline] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until `stop`. Cancelling it ends local training at its next step, and says no goodbye.

        Raises:
            Unauthenticated: the server does not, or no longer, accept this client.
            Refused: whoever answers is no server for this client.
        """
        sessions = asyncio.create_task(self._keep_session(), name="sessions")
        work = asyncio.create_task(self._work_off(), name="work")
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        tasks: list[asyncio.Task[Any]] = [work, sessions, stop]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            work.cancel()
            await asyncio.wait({work})
            for assignment_id in self._hand.ids:
                self._decline(assignment_id, "the client is shutting down", transient=True)
            if self._session is not None:
                await first_of(self._declines.join(), self._clock.sleep(GOODBYE_S))
        finally:
            await _end(*tasks)
            for assignment_id in self._hand.ids:
                self._hand.remove(assignment_id)
        for task in (work, sessions):
            if not task.cancelled():
                task.result()

    def stop(self) -> None:
        """Take nothing new, end local training at its next step, decline what is in hand, and leave."""
        self._stopping.set()

    # The session.

    async def _keep_session(self) -> None:
        """Connect again and again; at once if the last session was of use: it lasted, or its work got on."""
        while True:
            began_s: float | None = None
            interval_s = 0.0
            try:
                about = replace(self._about, assignment_ids=self._hand.ids)
                async with self._transport.connect(about) as session:
                    began_s, interval_s = self._clock.now_s(), session.heartbeat_interval_s
                    _log.info("connected", extra={"client": self._transport.client})
                    await self._serve(session)
                _log.info("the server closed the session")
            except Unreachable as error:
                _log.warning("server not reachable", extra={"reason": str(error)})
            if began_s is not None and self._clock.now_s() - began_s >= interval_s:
                self._backoff.reset()
            await first_of(self._contact.wait(), self._clock.sleep(self._backoff.next_s()))

    async def _serve(self, session: Session) -> None:
        self._session = session
        self._contact.fire()
        try:
            await first_of(self._hear(session), self._beat(session), self._post(session))
        finally:
            self._session = None

    async def _hear(self, session: Session) -> None:
        async for order in session.orders():
            if isinstance(order, Cancel):
                self._cancel(order)
            else:
                self._take(order)

    async def _beat(self, session: Session) -> None:
        while True:
            await self._clock.sleep(session.heartbeat_interval_s)
            entry = self._hand.current
            beat = Heartbeat(entry.assignment.assignment_id, entry.progress) if entry else Heartbeat()
            await session.send(beat)

    async def _post(self, session: Session) -> None:
        """Send what is declined. One that a break swallows is made again when the server asks again."""
        while True:
            decline = await self._declines.get()
            try:
                taken_again = self._hand.get(decline.assignment_id) is not None and not self._stopping.is_set()
                if not taken_again:
                    await session.send(decline)
            except (Unreachable, asyncio.CancelledError):
                self._declines.put_nowait(decline)
                raise
            finally:
                self._declines.task_done()

    def _take(self, assignment: Assignment) -> None:
        fields = _fields(assignment)
        if self._hand.get(assignment.assignment_id) is not None:
            _log.debug("assignment is in hand already", extra=fields)
        elif len(self._hand.ids) >= MAX_IN_HAND:
            self._decline(assignment.assignment_id, f"{MAX_IN_HAND} assignments are in hand already", transient=True)
        else:
            _log.info("assignment", extra=fields)
            self._hand.add(assignment)

    def _cancel(self, order: Cancel) -> None:
        entry = self._hand.get(order.assignment_id)
        if entry is None:
            return
        _log.info("assignment cancelled", extra={**_fields(entry.assignment), "reason": order.reason})
        if entry.task is None:
            self._hand.remove(order.assignment_id)
        else:
            entry.task.cancel()

    def _decline(self, assignment_id: str, reason: str, *, transient: bool) -> None:
        _log.warning("assignment declined", extra={"assignment": assignment_id, "reason": reason})
        self._declines.put_nowait(Decline(assignment_id, reason, transient))

    # The work.

    async def _work_off(self) -> None:
        while True:
            entry = await self._hand.first()
            entry.task = asyncio.create_task(self._perform(entry), name="assignment")
            try:
                await asyncio.wait({entry.task})
            finally:
                await _end(entry.task)
            self._finish(entry, entry.task)

    async def _perform(self, entry: Entry) -> UploadState:
        assignment = entry.assignment
        if self._clock.now_s() >= entry.deadline_s:
            raise Unreachable(f"its deadline of {assignment.deadline_s:g} s passed while other work was in hand")
        retry = Retry(self._clock, entry.deadline_s, self._rng, self._pause, self._backoff.reset)
        if assignment.kind is WorkKind.INITIALISE:
            update = await self._compute(entry, partial(self._maker.initialise, assignment))
        else:
            frame = await self._frame(entry, retry)
            if num_bytes := await self._compute(entry, partial(self._maker.frozen.basis_bytes, assignment)):
                basis = await self._frames.basis(assignment, num_bytes, retry)
                await self._compute(entry, partial(self._maker.frozen.set_basis, assignment, basis))
            missing, max_bytes = await self._compute(entry, partial(self._maker.frozen.missing_changes, assignment))
            for version in missing:
                change = await self._frames.change(assignment, version, max_bytes, retry)
                await self._compute(entry, partial(self._maker.frozen.change_base, assignment, version, change))
            make = partial(self._maker.update, assignment, frame, entry.set_progress, entry.stop)
            update = await self._compute(entry, make)
        return await deliver(self._transport, update, retry)

    async def _frame(self, entry: Entry, retry: Retry) -> memoryview:
        assignment = entry.assignment
        if (frame := self._frames.at_hand(assignment)) is not None:
            return frame
        limit = await self._compute(entry, partial(self._maker.max_frame_bytes, assignment))
        known = await self._compute(entry, partial(self._maker.frozen.known_frame, assignment))
        return await self._frames.download(assignment, limit, retry) if known is None else known

    async def _compute(self, entry: Entry, function: Callable[[], _T]) -> _T:
        """Run `function` on the worker's thread; when cancelled, tell it to stop and wait until it has."""

        def guarded() -> _T:
            if entry.stop.is_set():
                raise Stopped("stopped before it began")
            return function()

        future = asyncio.get_running_loop().run_in_executor(self._executor, guarded)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            entry.stop.set()
            await _settled(future)
            raise

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until the server is there again; the clock runs meanwhile."""
        with self._hand.waiting():
            await first_of(self._contact.wait(), self._clock.sleep(seconds))

    def _finish(self, entry: Entry, task: asyncio.Task[UploadState]) -> None:
        assignment = entry.assignment
        self._hand.remove(assignment.assignment_id)
        if task.cancelled():
            return
        try:
            state = task.result()
        except Unauthenticated:
            raise
        except FedError as error:
            # `Declined` says that this client cannot do such work; anything else is bad luck.
            self._decline(assignment.assignment_id, str(error), transient=not isinstance(error, Declined))
            return
        self._contact.fire()
        fields = {**_fields(assignment), "result": str(state.result)}
        if state.result is UpdateResult.ACCEPTED:
            self._backoff.reset()
            _log.info("update counted", extra=fields)
        else:
            _log.warning("update rejected", extra={**fields, "reason": state.text})


class _Signal:
    """Wakes whoever waits at this moment: the server was reached, so a back-off need not be sat out."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run all until the first ends, cancel the others, and raise what the first raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = [task for task in tasks if task.done()]
    finally:
        await _end(*tasks)
    for task in done:
        task.result()


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is theirs to report, or nobody's."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _settled(future: asyncio.Future[Any]) -> None:
    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()  # looked at, so that nobody warns of it


def _fields(assignment: Assignment) -> dict[str, object]:
    return {
        "assignment": assignment.assignment_id,
        "job": assignment.job_id,
        "version": assignment.version,
        "kind": str(assignment.kind),
    }
