"""What every store promises, and that the SQLite store is indistinguishable from its twin in memory."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedcore.errors import Refused, Unauthenticated, UpdateRejected, UpdateResult
from fedcore.messages import WorkKind
from fedserver.state.base import Store
from fedserver.state.memory import MemoryStore
from fedserver.state.records import (
    AssignmentRecord,
    AttemptRecord,
    BlobRecord,
    ClientRecord,
    JobRecord,
    JobStatus,
    Record,
    ReleaseRecord,
    TokenRecord,
    UpdateRecord,
    VersionRecord,
)
from fedserver.state.sqlite import SqliteStore

CLIENT = ClientRecord("ada", "0a", b"key\x00", 1.5, 2.5)
TOKEN = TokenRecord("5e" * 32, "ada", 1.0, 2.0)
JOB = JobRecord("j1", "digits", b'{"rounds":2}', JobStatus.RUNNING, 3.0)
ATTEMPT = AttemptRecord("j1", 0, 0, WorkKind.TRAIN, 4.0, 64.0)
ASSIGNMENT = AssignmentRecord("a1", "j1", 0, 0, WorkKind.TRAIN, "ada", 5.0)
UPDATE = UpdateRecord(
    update_id="1f" * 16,
    assignment_id="a1",
    job_id="j1",
    version=0,
    attempt=0,
    kind=WorkKind.TRAIN,
    client="ada",
    result=UpdateResult.ACCEPTED,
    text="",
    header=b"{}",
    signature=b"\xff\x00",
    blob="ab" * 32,
    frame_bytes=2**40,
    num_examples=2**47,
    metrics='{"loss":0.5}',
    received_at=6.25,
)
VERSION = VersionRecord("j1", 1, "cd" * 32, "ef" * 32, b"RTF1", "ab" * 32, None, 3, 90, 1000, 2000, 7.0)
BLOB = BlobRecord("cd" * 32, b"\x00state\xff")
RELEASE = ReleaseRecord("j1", 0, 0, WorkKind.TRAIN, '["alice"]', "{}", 9.0)
ONE_OF_EACH: tuple[Record, ...] = (CLIENT, TOKEN, JOB, ATTEMPT, ASSIGNMENT, UPDATE, VERSION, RELEASE, BLOB)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "store.sqlite")
    yield made
    made.close()


def test_every_kind_of_record_comes_back_as_it_was_written(store: Store) -> None:
    store.write(ONE_OF_EACH)
    assert store.clients() == [CLIENT]
    assert store.client("ada") == CLIENT
    assert store.tokens() == [TOKEN]
    assert store.token(TOKEN.secret_sha256) == TOKEN
    assert store.jobs() == [JOB]
    assert store.job("j1") == JOB
    assert store.attempts("j1") == [ATTEMPT]
    assert store.assignments("j1", 0, 0) == [ASSIGNMENT]
    assert store.assignment("a1") == ASSIGNMENT
    assert store.updates("j1", 0) == [UPDATE]
    assert store.update(UPDATE.update_id) == UPDATE
    assert store.versions("j1") == [VERSION]
    assert store.releases("j1") == [RELEASE]
    assert store.releases("j2") == []
    assert store.version("j1", 1) == VERSION
    assert store.latest_version("j1") == VERSION
    assert store.blob(BLOB.digest) == BLOB


def test_enumerations_come_back_as_enumerations(store: Store) -> None:
    store.write(ONE_OF_EACH)
    job, update = store.job("j1"), store.update(UPDATE.update_id)
    assert job is not None
    assert job.status is JobStatus.RUNNING
    assert update is not None
    assert update.result is UpdateResult.ACCEPTED
    assert update.kind is WorkKind.TRAIN


def test_what_is_not_there_is_none_or_an_empty_list(store: Store) -> None:
    assert store.client("ada") is None
    assert store.token("00") is None
    assert store.job("j1") is None
    assert store.version("j1", 0) is None
    assert store.latest_version("j1") is None
    assert store.assignment("a1") is None
    assert store.update("00") is None
    assert store.blob("00") is None
    assert store.updates("j1", 0) == []
    assert store.attempts("j1") == []


def test_a_record_of_the_same_key_replaces_the_whole_record_and_keeps_its_place(store: Store) -> None:
    other = replace(JOB, job_id="j2")
    changed = replace(JOB, status=JobStatus.FAILED, finished_at=9.0, failure="no clients", layout=b"[]")
    store.write([JOB, other])
    store.write([changed])
    assert store.jobs() == [changed, other]
    store.write([JOB])
    assert store.jobs() == [JOB, other]


def test_the_same_small_blob_may_be_written_twice(store: Store) -> None:
    store.write([BLOB, BLOB])
    store.write([BLOB])
    assert store.blob(BLOB.digest) == BLOB


def test_enrolling_again_replaces_the_serial(store: Store) -> None:
    store.write([CLIENT])
    store.write([replace(CLIENT, serial="0b")])
    client = store.client("ada")
    assert client is not None
    assert client.serial == "0b"


def test_an_update_id_is_written_once(store: Store) -> None:
    store.write([UPDATE])
    with pytest.raises(UpdateRejected, match="already recorded") as caught:
        store.write([replace(UPDATE, client="eve")])
    assert caught.value.reason is UpdateResult.DUPLICATE
    assert store.update(UPDATE.update_id) == UPDATE


def test_an_update_id_is_written_once_within_one_write_too(store: Store) -> None:
    with pytest.raises(UpdateRejected):
        store.write([UPDATE, UPDATE])
    assert store.update(UPDATE.update_id) is None


def test_a_used_token_cannot_be_used_again(store: Store) -> None:
    store.write([TOKEN])
    store.write([replace(TOKEN, used_at=1.25)])
    with pytest.raises(Unauthenticated, match="already used"):
        store.write([replace(TOKEN, used_at=1.5), CLIENT])
    assert store.tokens() == [replace(TOKEN, used_at=1.25)]
    assert store.clients() == []


def test_a_refused_write_leaves_nothing_behind_and_the_store_in_use(store: Store) -> None:
    store.write([UPDATE])
    with pytest.raises(UpdateRejected):
        store.write([CLIENT, JOB, UPDATE])
    assert store.clients() == []
    assert store.jobs() == []
    store.write([CLIENT])
    assert store.clients() == [CLIENT]


def test_versions_are_sorted_by_number_and_clients_by_name(store: Store) -> None:
    store.write([replace(VERSION, version=10), replace(VERSION, version=9), replace(VERSION, job_id="j2", version=11)])
    store.write([CLIENT, replace(CLIENT, name="Zoe"), replace(CLIENT, name="ab")])
    assert [version.version for version in store.versions("j1")] == [9, 10]
    latest = store.latest_version("j1")
    assert latest is not None
    assert latest.version == 10
    assert [client.name for client in store.clients()] == ["Zoe", "ab", "ada"]


def test_attempts_of_different_kinds_are_different_attempts(store: Store) -> None:
    evaluation = replace(ATTEMPT, kind=WorkKind.EVALUATE)
    store.write([ATTEMPT, evaluation])
    store.write([replace(ATTEMPT, outcome="closed", closed_at=8.0)])
    assert store.attempts("j1") == [replace(ATTEMPT, outcome="closed", closed_at=8.0), evaluation]


def test_assignments_and_updates_are_narrowed_by_attempt_and_kind(store: Store) -> None:
    assignments = [
        replace(ASSIGNMENT, assignment_id=f"a{attempt}{kind}", attempt=attempt, kind=kind)
        for attempt in (0, 1)
        for kind in WorkKind
    ]
    updates = [
        replace(UPDATE, update_id=f"u{attempt}{kind}", attempt=attempt, kind=kind)
        for attempt in (0, 1)
        for kind in WorkKind
    ]
    store.write([*assignments, *updates])
    num, train = len(WorkKind), list(WorkKind).index(WorkKind.TRAIN)
    assert store.assignments("j1", 0, 1) == assignments[num:]
    assert store.assignments("j1", 0, 1, WorkKind.TRAIN) == [assignments[num + train]]
    assert store.updates("j1", 0) == updates
    assert store.updates("j1", 0, 0) == updates[:num]
    assert store.updates("j1", 0, kind=WorkKind.TRAIN) == [updates[train], updates[num + train]]
    assert store.updates("j1", 1) == []


def test_reads_on_other_threads_see_whole_writes_only(store: Store) -> None:
    """Each write puts one client and one job; a reader never sees a job whose client is missing."""
    torn: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            jobs = store.jobs()
            clients = {client.name for client in store.clients()}
            torn.extend(job.name for job in jobs if job.name not in clients)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(50):
        store.write([replace(JOB, job_id=f"j{number}", name=f"c{number}"), replace(CLIENT, name=f"c{number}")])
    stop.set()
    for reader in readers:
        reader.join()
    assert torn == []


def test_closing_twice_is_harmless(store: Store) -> None:
    store.close()
    store.close()


# -- the twins -------------------------------------------------------------------------------------------------------

TIMES = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 2**31).map(float)
MAYBE_TIMES = st.none() | TIMES
# From few values, so that keys collide; with what trips up databases among them.
IDS = st.sampled_from(["a", "b", "A", "1", "01", "ä\U0001f600", "a\x00b", "'; DROP TABLE jobs; --"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["1", "1e3", "NULL"])
BYTES = st.binary(max_size=8)
SMALL = st.integers(0, 2)
COUNTS = st.integers(0, 2**63 - 1)
KINDS = st.sampled_from(WorkKind)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(ClientRecord, IDS, TEXTS, BYTES, TIMES, TIMES, MAYBE_TIMES),
    st.builds(TokenRecord, IDS, TEXTS, TIMES, TIMES, MAYBE_TIMES),
    st.builds(JobRecord, IDS, TEXTS, BYTES, st.sampled_from(JobStatus), TIMES, MAYBE_TIMES, TEXTS, st.none() | BYTES),
    st.builds(AttemptRecord, IDS, SMALL, SMALL, KINDS, TIMES, TIMES, MAYBE_TIMES, TEXTS, TEXTS, SMALL),
    st.builds(ReleaseRecord, IDS, SMALL, SMALL, KINDS, TEXTS, TEXTS, TIMES),
    st.builds(AssignmentRecord, IDS, IDS, SMALL, SMALL, KINDS, TEXTS, TIMES, TEXTS, TEXTS),
    st.builds(
        UpdateRecord,
        update_id=IDS,
        assignment_id=IDS,
        job_id=IDS,
        version=SMALL,
        attempt=SMALL,
        kind=KINDS,
        client=TEXTS,
        result=st.sampled_from(UpdateResult),
        text=TEXTS,
        header=BYTES,
        signature=BYTES,
        blob=st.none() | TEXTS,
        frame_bytes=COUNTS,
        num_examples=COUNTS,
        metrics=TEXTS,
        received_at=TIMES,
    ),
    st.builds(
        VersionRecord,
        IDS,
        SMALL,
        TEXTS,
        TEXTS,
        BYTES,
        TEXTS,
        st.none() | TEXTS,
        COUNTS,
        COUNTS,
        COUNTS,
        COUNTS,
        TIMES,
        TEXTS,
    ),
)


def refusal_of(write: Callable[[Sequence[Record]], None], records: Sequence[Record]) -> tuple[type, str] | None:
    try:
        write(records)
    except Refused as error:
        return type(error), str(error)
    return None


class SqliteAndMemory(RuleBasedStateMachine):
    """Whatever is written, refused, closed and reopened: both answer alike."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store.sqlite"
        self.sqlite = SqliteStore(self.path)
        self.memory = MemoryStore()

    def teardown(self) -> None:
        self.sqlite.close()
        self.folder.cleanup()

    @rule(records=st.lists(RECORDS, max_size=6))
    def write(self, records: list[Record]) -> None:
        assert refusal_of(self.sqlite.write, records) == refusal_of(self.memory.write, records)

    @rule()
    def reopen(self) -> None:
        self.sqlite.close()
        self.sqlite = SqliteStore(self.path)

    @rule(key=IDS, version=SMALL, attempt=SMALL, kind=st.none() | KINDS)
    def look_up(self, key: str, version: int, attempt: int, kind: WorkKind | None) -> None:
        one, other = self.sqlite, self.memory
        assert one.client(key) == other.client(key)
        assert one.token(key) == other.token(key)
        assert one.job(key) == other.job(key)
        assert one.version(key, version) == other.version(key, version)
        assert one.latest_version(key) == other.latest_version(key)
        assert one.assignment(key) == other.assignment(key)
        assert one.assignments(key, version, attempt, kind) == other.assignments(key, version, attempt, kind)
        assert one.update(key) == other.update(key)
        assert one.updates(key, version, attempt, kind) == other.updates(key, version, attempt, kind)
        assert one.updates(key, version) == other.updates(key, version)

    @invariant()
    def lists_agree(self) -> None:
        assert self.sqlite.clients() == self.memory.clients()
        assert self.sqlite.tokens() == self.memory.tokens()
        assert self.sqlite.jobs() == self.memory.jobs()
        for job in ("a", "1", "ä\U0001f600", "a\x00b"):
            assert self.sqlite.versions(job) == self.memory.versions(job)
            assert self.sqlite.attempts(job) == self.memory.attempts(job)


TestSqliteAndMemory = SqliteAndMemory.TestCase
TestSqliteAndMemory.settings = settings(max_examples=20, stateful_step_count=15)
