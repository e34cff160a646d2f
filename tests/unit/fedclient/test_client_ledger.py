"""The client's ledger: what has left is in it, whatever happens to the file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclient.ledger import HEAD_FILE, LEDGER_FILE, FileLedger, Ledger, MemoryLedger
from fedclient.releases import Account, Entry
from fedcore.errors import StateUnusable, StorageFailed
from fedprivacy.events import Adjacency, Gaussian, History, Release, Trust, Unit

JOBS = ["a" * 32, "b" * 32]


def released(multiplier: float) -> History:
    release = Release(mechanisms=(Gaussian(noise_multiplier=multiplier),))
    return History(unit=Unit.CLIENT, adjacency=Adjacency.ZERO_OUT, trust=Trust.LOCAL, releases=(release,))


def entry(number: int, job: int = 0, history: History | None = None) -> Entry:
    return Entry(
        job_id=JOBS[job],
        job_name=f"job-{job}",
        version=number,
        kind="train",
        assignment_id=f"{number:032x}",
        released=history,
        wall_s=1e9 + number,
    )


ENTRIES = [entry(number, number % 2, released(1 + number % 3) if number % 4 else None) for number in range(6)]


def put(ledger: Ledger, *entries: Entry) -> None:
    for each in entries:
        with ledger.locked():
            ledger.append(each)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    put(FileLedger(tmp_path), *ENTRIES)
    return {name: (tmp_path / name).read_bytes() for name in (LEDGER_FILE, HEAD_FILE)}


def test_what_was_noted_is_there_after_a_restart(tmp_path: Path, files: dict[str, bytes]) -> None:
    in_memory = MemoryLedger()
    put(in_memory, *ENTRIES)
    with in_memory.locked() as expected:
        assert FileLedger(tmp_path).read() == expected
    with FileLedger(tmp_path).locked() as found:
        assert found == expected
    assert found.of(JOBS[1]).updates == 3
    assert (found.in_all().updates, found.in_all().unprotected) == (6, 2)
    for name in files:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_client_that_never_released_anything_has_no_ledger(tmp_path: Path) -> None:
    assert FileLedger(tmp_path).read().in_all() == Account()
    assert list(tmp_path.iterdir()) == []


def test_reading_changes_nothing(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = tmp_path / LEDGER_FILE
    path.write_bytes(files[LEDGER_FILE] + b'{"hash":"12')
    assert FileLedger(tmp_path).read().in_all().updates == len(ENTRIES)
    assert path.read_bytes() == files[LEDGER_FILE] + b'{"hash":"12'


def test_a_line_that_a_crash_has_cut_short_is_removed(
    tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    before, line = files[LEDGER_FILE], files[LEDGER_FILE].splitlines(keepends=True)[-1]
    head = (tmp_path / HEAD_FILE).read_bytes()
    put(FileLedger(tmp_path), entry(6))
    whole = (tmp_path / LEDGER_FILE).read_bytes()
    for cut in range(1, len(whole) - len(before)):
        (tmp_path / LEDGER_FILE).write_bytes(whole[:-cut])
        (tmp_path / HEAD_FILE).write_bytes(head)  # is written once the line is whole
        with FileLedger(tmp_path).locked() as accounts:
            assert accounts.in_all().updates == len(ENTRIES)
        assert (tmp_path / LEDGER_FILE).read_bytes() == before
    assert line.endswith(b"\n")
    assert "line cut short is removed" in caplog.text


def test_a_line_that_is_whole_counts_whatever_became_of_it(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(FileLedger(tmp_path), entry(6))
    (tmp_path / HEAD_FILE).write_bytes(files[HEAD_FILE])  # killed between the line and the head
    for _ in range(2):
        ledger = FileLedger(tmp_path)
        with ledger.locked() as accounts:
            assert accounts.in_all().updates == len(ENTRIES) + 1
    assert (tmp_path / HEAD_FILE).read_bytes() != files[HEAD_FILE]


@pytest.mark.parametrize("name", [LEDGER_FILE, HEAD_FILE])
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_a_changed_byte_or_a_lost_end_is_an_error(
    tmp_path: Path, files: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    """Every line here is known to be on disk, so that nothing of it may go."""
    whole = files[name]
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
        damaged = whole[:at] + bytes([byte]) + whole[at + 1 :]
    for each, content in files.items():
        (tmp_path / each).write_bytes(damaged if each == name else content)
    try:
        accounts = FileLedger(tmp_path).read()
    except StateUnusable:
        pass
    else:  # white space at the end of the head, and nothing else
        assert (name, at) == (HEAD_FILE, len(whole) - 1)
        assert accounts.in_all().updates == len(ENTRIES)
        return
    with pytest.raises(StateUnusable):
        put(FileLedger(tmp_path), entry(6))
    assert (tmp_path / name).read_bytes() == damaged, "a damaged file is left to whoever can mend it"


@given(st.permutations(range(len(ENTRIES))), st.integers(0, len(ENTRIES)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_lines_in_another_order_or_missing_or_twice_are_an_error(
    tmp_path: Path, files: dict[str, bytes], order: list[int], num: int
) -> None:
    lines = files[LEDGER_FILE].splitlines(keepends=True)
    for changed in (order[:num], [*range(len(lines)), *order[:num]]):
        (tmp_path / LEDGER_FILE).write_bytes(b"".join(lines[index] for index in changed))
        if list(changed) != list(range(len(lines))):
            with pytest.raises(StateUnusable):
                FileLedger(tmp_path).read()


@pytest.mark.parametrize("name", [LEDGER_FILE, HEAD_FILE])
def test_a_file_that_has_gone_is_an_error(tmp_path: Path, files: dict[str, bytes], name: str) -> None:
    running = FileLedger(tmp_path)
    put(running, entry(6))
    (tmp_path / name).unlink()
    for ledger in (running, FileLedger(tmp_path)):
        with pytest.raises(StateUnusable, match="privacy ledger"):
            put(ledger, entry(7))


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, function: str, *, room: int = 0) -> Iterator[None]:
    """Let a call write `room` bytes, and fail then."""
    real = getattr(os, function)

    def full(descriptor: int, *arguments: object) -> int:
        nonlocal room
        if function == "pwrite" and room > 0:
            data, offset = arguments
            assert isinstance(data, memoryview) and isinstance(offset, int)  # noqa: PT018
            written: int = real(descriptor, data[:room], offset)
            room -= written
            return written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        yield


@pytest.mark.parametrize(("function", "room"), [("pwrite", 0), ("pwrite", 40), ("fsync", 0)])
def test_a_full_disk_stops_the_release_and_goes_by(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, function: str, room: int
) -> None:
    ledger = FileLedger(tmp_path)
    with disk(monkeypatch, function, room=room), pytest.raises(StorageFailed, match="privacy-ledger"):
        put(ledger, entry(6))
    put(ledger, entry(7))
    may_count_more = function == "fsync"  # the line was whole
    for found in (ledger, FileLedger(tmp_path)):
        assert found.read().in_all().updates == len(ENTRIES) + 1 + may_count_more


def test_line_head_and_names_are_on_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    put(FileLedger(tmp_path), entry(0))
    folder, head = tmp_path.name, synced[2]
    assert head.startswith(f".{HEAD_FILE}.")
    assert synced == [folder, LEDGER_FILE, head, folder]
    put(FileLedger(tmp_path), entry(1))
    assert synced[4] == LEDGER_FILE


def append_many(folder: Path, job: int, num: int) -> None:
    ledger = FileLedger(folder)
    for number in range(num):
        with ledger.locked() as accounts:
            before = accounts.in_all().updates
            ledger.append(entry(number, job, released(2.0)))
            assert accounts.in_all().updates == before + 1


def test_two_processes_do_not_write_into_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(tmp_path, job, 40)) for job in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    accounts = FileLedger(tmp_path).read()
    assert [accounts.of(job).updates for job in JOBS] == [40, 40]
    (history,) = accounts.in_all().histories
    assert history == released(2.0).model_copy(
        update={"releases": (released(2.0).releases[0].model_copy(update={"count": 80}),)}
    )
