"""The journal: group commit, refusals, and what happens after the storage fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedcore.clock import SystemClock
from fedcore.errors import StateError, StorageFailed, UpdateRejected, UpdateResult
from fedcore.messages import WorkKind
from fedserver.state.journal import Journal
from fedserver.state.memory import MemoryStore
from fedserver.state.records import ClientRecord, Record, UpdateRecord

CLIENT = ClientRecord("ada", "0a", b"", 1.0, 2.0)
UPDATE = UpdateRecord(
    "1f" * 16, "a", "j", 0, 0, WorkKind.TRAIN, "ada", UpdateResult.ACCEPTED, "", b"", b"", None, 0, 1, "{}", 1.0
)


class Gated(MemoryStore):
    """Waits before each write until the test lets it go on; fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.batches: list[int] = []
        self.failure: Exception | None = None

    def write(self, records: Sequence[Record]) -> None:
        self.begun.release()
        self.gate.acquire()
        if self.failure is not None:
            raise self.failure
        super().write(records)
        self.batches.append(len(records))


async def wait_until_writing(store: Gated) -> None:
    await asyncio.to_thread(store.begun.acquire)


def client(number: int) -> ClientRecord:
    return replace(CLIENT, name=f"c{number}")


async def test_a_write_returns_when_the_record_is_in_the_store() -> None:
    store = MemoryStore()
    journal = Journal(store, SystemClock())
    await journal.write(CLIENT, UPDATE)
    assert store.clients() == [CLIENT]
    assert store.update(UPDATE.update_id) == UPDATE
    await journal.close()


async def test_what_gathers_while_a_batch_is_written_becomes_one_batch() -> None:
    store, sizes = Gated(), list[int]()
    journal = Journal(store, SystemClock(), lambda records, _seconds: sizes.append(records))
    first = asyncio.create_task(journal.write(client(0)))
    await wait_until_writing(store)
    others = [asyncio.create_task(journal.write(client(number))) for number in range(1, 10)]
    await asyncio.to_thread(lambda: None)  # the other tasks have begun
    assert not first.done()
    store.gate.release(2)
    await asyncio.gather(first, *others)
    assert store.batches == [1, 9]
    assert sizes == [1, 9]
    assert [record.name for record in store.clients()] == [f"c{number}" for number in range(10)]
    await journal.close()


async def test_a_refused_write_does_not_hurt_its_neighbours() -> None:
    store = Gated()
    journal = Journal(store, SystemClock())
    first = asyncio.create_task(journal.write(UPDATE))
    await wait_until_writing(store)
    others = [asyncio.create_task(journal.write(*records)) for records in ([client(1)], [UPDATE], [client(2)])]
    await asyncio.to_thread(lambda: None)
    store.gate.release(10)
    await first
    results = await asyncio.gather(*others, return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], UpdateRejected)
    assert results[1].reason is UpdateResult.DUPLICATE
    assert results[2] is None
    assert [record.name for record in store.clients()] == ["c1", "c2"]
    assert not journal.failed.done()
    await journal.close()


async def test_after_a_storage_error_everybody_is_told_and_nothing_more_is_written() -> None:
    store = Gated()
    journal = Journal(store, SystemClock())
    first = asyncio.create_task(journal.write(client(0)))
    await wait_until_writing(store)
    second = asyncio.create_task(journal.write(client(1)))
    await asyncio.to_thread(lambda: None)
    store.failure = StorageFailed("cannot write x: No space left on device")
    store.gate.release(10)
    for waiting in (first, second):
        with pytest.raises(StorageFailed, match="No space left"):
            await waiting
    assert str(await journal.failed) == "cannot write x: No space left on device"
    store.failure = None  # there is space again, but nobody knows what was lost
    with pytest.raises(StorageFailed, match="No space left"):
        await journal.write(client(2))
    assert store.clients() == []
    await journal.close()


async def test_an_error_nobody_foresaw_stops_the_journal_and_leaves_nobody_waiting() -> None:
    store = Gated()
    store.failure = sqlite3.ProgrammingError("wrong binding")
    store.gate.release(10)
    journal = Journal(store, SystemClock())
    with pytest.raises(StorageFailed, match="ProgrammingError: wrong binding"):
        await journal.write(CLIENT)
    failure: StateError = await journal.failed
    assert failure.__cause__ is store.failure
    await journal.close()


async def test_a_cancelled_waiter_does_not_disturb_the_others() -> None:
    store = Gated()
    journal = Journal(store, SystemClock())
    first = asyncio.create_task(journal.write(client(0)))
    await wait_until_writing(store)
    second = asyncio.create_task(journal.write(client(1)))
    await asyncio.to_thread(lambda: None)
    first.cancel()
    store.gate.release(2)
    await second
    assert [record.name for record in store.clients()] == ["c0", "c1"]
    await journal.close()


async def test_closing_finishes_what_was_asked_for_and_refuses_more() -> None:
    store = Gated()
    journal = Journal(store, SystemClock())
    first = asyncio.create_task(journal.write(client(0)))
    await wait_until_writing(store)
    second = asyncio.create_task(journal.write(client(1)))
    await asyncio.to_thread(lambda: None)
    store.gate.release(2)
    await journal.close()
    await asyncio.gather(first, second)
    assert len(store.clients()) == 2
    with pytest.raises(StorageFailed, match="closed"):
        await journal.write(client(2))
    await journal.close()


async def test_writes_one_after_the_other_are_never_forgotten() -> None:
    """Each write begins just when the one before has ended, which is when the flushing task ends too."""
    store = MemoryStore()
    journal = Journal(store, SystemClock())

    async def worker(worker: int) -> None:
        for number in range(100):
            await journal.write(replace(CLIENT, name=f"c{worker}-{number}"))

    async with asyncio.timeout(30):
        await asyncio.gather(*(worker(number) for number in range(5)))
    assert len(store.clients()) == 500
    await journal.close()
