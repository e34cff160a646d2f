"""Group commit: many small writes from the event loop share one flush of the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedcore.clock import Clock
from fedcore.errors import Refused, StateError, StorageFailed
from fedserver.state.base import Store
from fedserver.state.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    records: Sequence[Record]
    durable: asyncio.Future[None]


class Journal:
    """The only writer of a store. Made and used on one event loop; `store.write` runs on a thread of its own.

    While one batch is being written, whatever is asked for gathers, and makes up the next. A batch is one transaction.
    Writes become durable in the order in which they were asked for.

    After the first storage error nothing more is written, and nothing is tried again: when flushing failed, the kernel
    may have dropped the pages and would report the next flush as a success. A restart reads what is really there.

    Attributes:
        failed: resolves to the storage error that stopped the journal; the daemon waits for it and stops too.
    """

    def __init__(self, store: Store, clock: Clock, on_batch: Callable[[int, float], None] | None = None) -> None:
        """Write to `store`; the caller closes that, after `close`.

        Args:
            store: no one else writes to it.
            clock: writing counts as work on it, so virtual time does not run on meanwhile.
            on_batch: called on the event loop after each durable batch: number of records, seconds.
        """
        self.failed: asyncio.Future[StateError] = asyncio.get_running_loop().create_future()
        self._store, self._clock, self._on_batch = store, clock, on_batch
        self._pending: list[_Entry] = []
        self._flushing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._closed = False

    async def write(self, *records: Record) -> None:
        """Return when all of `records` are durable; they become so together.

        When this is cancelled the records may or may not be written.

        Raises:
            Refused: the records contradict what is recorded (see `Store.write`); other writes are not concerned.
            StateError: storage failed, now or earlier. Whether the records survived is known only after a restart.
        """
        if self.failed.done():
            raise _stopped(self.failed.result())
        if self._closed:
            raise StorageFailed("the journal is closed")
        entry = _Entry(records, asyncio.get_running_loop().create_future())
        self._pending.append(entry)
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush(), name="journal")
            self._flushing.add_done_callback(self._flushed)
        with self._clock.working():
            await entry.durable

    def stop(self, error: StateError) -> None:
        """Write nothing any more: storage next to the journal has failed."""
        if not self.failed.done():
            self._fail(error, [])

    async def close(self) -> None:
        """Finish what was asked for, then refuse more. Raises nothing: every writer was told of its own failure."""
        self._closed = True
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        self._thread.shutdown()

    async def _flush(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await self._commit(batch)
            except StateError as error:
                self._fail(error, batch)
                return
            finally:
                # Only an error that nobody foresaw leaves waiters behind; `_flushed` tells them.
                self._pending[:0] = [entry for entry in batch if not entry.durable.done()]
        self._flushing = None  # here, not in the callback: a write in between would find nobody at work

    async def _commit(self, batch: list[_Entry]) -> None:
        records = [record for entry in batch for record in entry.records]
        started_s = time.perf_counter()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.write, records)
        except Refused as error:
            # Nothing was written. Find out whose records they were, and let the others through.
            if len(batch) == 1:
                if not batch[0].durable.done():
                    batch[0].durable.set_exception(error)
                return
            for entry in batch:
                await self._commit([entry])
            return
        for entry in batch:
            if not entry.durable.done():  # it may have been cancelled
                entry.durable.set_result(None)
        if self._on_batch is not None:
            self._on_batch(len(records), time.perf_counter() - started_s)

    def _fail(self, error: StateError, entries: list[_Entry]) -> None:
        self.failed.set_result(error)
        waiting, self._pending = [*entries, *self._pending], []
        for entry in waiting:
            if not entry.durable.done():
                entry.durable.set_exception(_stopped(error))

    def _flushed(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError("the event loop stopped") if task.cancelled() else task.exception()
        if error is not None:
            failure = StorageFailed(f"the journal stopped: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(failure, [])


def _stopped(error: StateError) -> StateError:
    """Return an error of its own for each waiter: raising one object in several tasks tangles their tracebacks."""
    again = type(error)(str(error))
    again.__cause__ = error
    return again
