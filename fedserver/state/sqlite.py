"""The store on one SQLite file.

Write-ahead log with `synchronous=FULL`: a commit returns when the log is flushed, readers are never blocked by the
writer, and after a crash SQLite keeps exactly the transactions that were committed.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from fedcore.errors import StateUnusable, UpdateResult
from fedcore.messages import WorkKind
from fedserver.state.checks import check_replaceable, record_key
from fedserver.state.failures import storage_errors
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

_log = logging.getLogger(__name__)

# One table a record, one column a field, of the same names. `position` is the order of first writing.
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS clients (
    position INTEGER PRIMARY KEY,
    name TEXT NOT NULL, serial TEXT NOT NULL, signing_key BLOB NOT NULL,
    enrolled_at REAL NOT NULL, expires_at REAL NOT NULL, revoked_at REAL,
    UNIQUE (name)
);
CREATE TABLE IF NOT EXISTS tokens (
    position INTEGER PRIMARY KEY,
    secret_sha256 TEXT NOT NULL, client TEXT NOT NULL,
    created_at REAL NOT NULL, expires_at REAL NOT NULL, used_at REAL,
    UNIQUE (secret_sha256)
);
CREATE TABLE IF NOT EXISTS jobs (
    position INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL, name TEXT NOT NULL, spec BLOB NOT NULL, status TEXT NOT NULL,
    submitted_at REAL NOT NULL, finished_at REAL, failure TEXT NOT NULL, layout BLOB,
    base_digest TEXT, adapter_blob TEXT, privacy TEXT,
    UNIQUE (job_id)
);
CREATE TABLE IF NOT EXISTS attempts (
    position INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL, version INTEGER NOT NULL, attempt INTEGER NOT NULL, kind TEXT NOT NULL,
    opened_at REAL NOT NULL, deadline_at REAL NOT NULL, closed_at REAL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
    available INTEGER NOT NULL,
    UNIQUE (job_id, version, attempt, kind)
);
CREATE TABLE IF NOT EXISTS assignments (
    position INTEGER PRIMARY KEY,
    assignment_id TEXT NOT NULL, job_id TEXT NOT NULL, version INTEGER NOT NULL, attempt INTEGER NOT NULL,
    kind TEXT NOT NULL, client TEXT NOT NULL, assigned_at REAL NOT NULL, ended TEXT NOT NULL, text TEXT NOT NULL,
    UNIQUE (assignment_id)
);
CREATE INDEX IF NOT EXISTS assignments_of_attempt ON assignments (job_id, version, attempt);
CREATE TABLE IF NOT EXISTS updates (
    position INTEGER PRIMARY KEY,
    update_id TEXT NOT NULL, assignment_id TEXT NOT NULL, job_id TEXT NOT NULL, version INTEGER NOT NULL,
    attempt INTEGER NOT NULL, kind TEXT NOT NULL, client TEXT NOT NULL, result TEXT NOT NULL, text TEXT NOT NULL,
    header BLOB NOT NULL, signature BLOB NOT NULL, blob TEXT, frame_bytes INTEGER NOT NULL,
    num_examples INTEGER NOT NULL, metrics TEXT NOT NULL, received_at REAL NOT NULL,
    UNIQUE (update_id)
);
CREATE INDEX IF NOT EXISTS updates_of_attempt ON updates (job_id, version, attempt);
CREATE TABLE IF NOT EXISTS versions (
    position INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL, version INTEGER NOT NULL, state_blob TEXT NOT NULL,
    frame_digest TEXT NOT NULL, frame_head BLOB NOT NULL, frame_body TEXT NOT NULL,
    optimizer_blob TEXT, num_updates INTEGER NOT NULL, num_examples INTEGER NOT NULL,
    uplink_bytes INTEGER NOT NULL, downlink_bytes INTEGER NOT NULL, created_at REAL NOT NULL, metrics TEXT NOT NULL,
    raw_uplink_bytes INTEGER NOT NULL, encoding_error REAL, basis_blob TEXT,
    change_blob TEXT, revision TEXT NOT NULL, changed_since INTEGER NOT NULL, changed_bytes INTEGER NOT NULL,
    epsilon REAL, clip REAL,
    UNIQUE (job_id, version)
);
CREATE TABLE IF NOT EXISTS releases (
    position INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL, version INTEGER NOT NULL, attempt INTEGER NOT NULL, kind TEXT NOT NULL,
    clients TEXT NOT NULL, released TEXT NOT NULL, released_at REAL NOT NULL,
    UNIQUE (job_id, version, attempt, kind)
);
CREATE TABLE IF NOT EXISTS blobs (
    position INTEGER PRIMARY KEY,
    digest TEXT NOT NULL, data BLOB NOT NULL,
    UNIQUE (digest)
);
"""

_TABLES: Final[dict[type, str]] = {
    ClientRecord: "clients",
    TokenRecord: "tokens",
    JobRecord: "jobs",
    AttemptRecord: "attempts",
    AssignmentRecord: "assignments",
    UpdateRecord: "updates",
    VersionRecord: "versions",
    ReleaseRecord: "releases",
    BlobRecord: "blobs",
}
_LOG_PAGES: Final = 4096
"""Pages of 4 KiB in the log before SQLite carries them over into the database: small blobs fill a shorter one fast."""

_COLUMNS: Final = {kind: [field.name for field in fields(kind)] for kind in _TABLES}
_ENUMS: Final[dict[str, type[StrEnum]]] = {"status": JobStatus, "kind": WorkKind, "result": UpdateResult}

R = TypeVar("R")  # a class of record


class SqliteStore:
    """See `fedserver.state.base.Store`. The caller makes sure that no other process opens the file."""

    def __init__(self, path: Path) -> None:
        """Open the database, made if it is missing.

        Raises:
            StateUnusable: the file is no database, or damaged.
            StorageFailed: it cannot be opened or written.
        """
        self._path = path
        self._reading = threading.Lock()
        with storage_errors(f"open {path}"):
            self._writer = _connect(path)
            try:
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
                self._writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                self._reader = _connect(path)
                self._reader.execute("PRAGMA query_only = ON")
            except sqlite3.Error:
                self._writer.close()
                raise
        _log.info("records are in %s, SQLite %s", path, sqlite3.sqlite_version)

    def write(self, records: Sequence[Record]) -> None:
        """See `Store.write`."""
        with storage_errors(f"write {self._path}"):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                for record in records:
                    self._put(record)
                self._writer.execute("COMMIT")
            finally:
                # After some errors SQLite has rolled back by itself.
                if self._writer.in_transaction:
                    with suppress(sqlite3.Error):  # the error that brought us here says more
                        self._writer.execute("ROLLBACK")

    def _put(self, record: Record) -> None:
        kind = type(record)
        if kind in (UpdateRecord, TokenRecord):
            key = dict(zip(record.KEY, record_key(record), strict=True))
            for existing in _select(self._writer, kind, key):
                check_replaceable(existing)
        self._writer.execute(_UPSERTS[kind], [getattr(record, column) for column in _COLUMNS[kind]])

    def clients(self) -> list[ClientRecord]:
        """See `Store.clients`."""
        return self._read(ClientRecord, order="name")

    def client(self, name: str) -> ClientRecord | None:
        """See `Store.client`."""
        return _only(self._read(ClientRecord, name=name))

    def tokens(self) -> list[TokenRecord]:
        """See `Store.tokens`."""
        return self._read(TokenRecord)

    def token(self, secret_sha256: str) -> TokenRecord | None:
        """See `Store.token`."""
        return _only(self._read(TokenRecord, secret_sha256=secret_sha256))

    def jobs(self) -> list[JobRecord]:
        """See `Store.jobs`."""
        return self._read(JobRecord)

    def job(self, job_id: str) -> JobRecord | None:
        """See `Store.job`."""
        return _only(self._read(JobRecord, job_id=job_id))

    def versions(self, job_id: str) -> list[VersionRecord]:
        """See `Store.versions`."""
        return self._read(VersionRecord, order="version", job_id=job_id)

    def version(self, job_id: str, version: int) -> VersionRecord | None:
        """See `Store.version`."""
        return _only(self._read(VersionRecord, job_id=job_id, version=version))

    def latest_version(self, job_id: str) -> VersionRecord | None:
        """See `Store.latest_version`."""
        return _only(self._read(VersionRecord, order="version DESC LIMIT 1", job_id=job_id))

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """See `Store.attempts`."""
        return self._read(AttemptRecord, job_id=job_id)

    def assignments(
        self, job_id: str, version: int, attempt: int, kind: WorkKind | None = None
    ) -> list[AssignmentRecord]:
        """See `Store.assignments`."""
        return self._read(AssignmentRecord, job_id=job_id, version=version, attempt=attempt, kind=kind)

    def assignment(self, assignment_id: str) -> AssignmentRecord | None:
        """See `Store.assignment`."""
        return _only(self._read(AssignmentRecord, assignment_id=assignment_id))

    def updates(
        self, job_id: str, version: int, attempt: int | None = None, kind: WorkKind | None = None
    ) -> list[UpdateRecord]:
        """See `Store.updates`."""
        return self._read(UpdateRecord, job_id=job_id, version=version, attempt=attempt, kind=kind)

    def update(self, update_id: str) -> UpdateRecord | None:
        """See `Store.update`."""
        return _only(self._read(UpdateRecord, update_id=update_id))

    def releases(self, job_id: str) -> list[ReleaseRecord]:
        """See `Store.releases`."""
        return self._read(ReleaseRecord, job_id=job_id)

    def blob(self, digest: str) -> BlobRecord | None:
        """See `Store.blob`."""
        return _only(self._read(BlobRecord, digest=digest))

    def close(self) -> None:
        """See `Store.close`."""
        with storage_errors(f"close {self._path}"), self._reading:
            self._reader.close()
            self._writer.close()

    def _read(self, table: type[R], /, order: str = "position", **where: object) -> list[R]:
        wanted = {column: value for column, value in where.items() if value is not None}
        with storage_errors(f"read {self._path}"), self._reading:
            return _select(self._reader, table, wanted, order)


def _connect(path: Path) -> sqlite3.Connection:
    # isolation_level None: transactions begin and end where this file says so.
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def _upsert(kind: type[Any]) -> str:
    columns = _COLUMNS[kind]
    changes = ", ".join(f"{column} = excluded.{column}" for column in columns if column not in kind.KEY)
    if kind is BlobRecord:  # the same name means the same bytes
        return f"INSERT OR IGNORE INTO {_TABLES[kind]} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    return (
        f"INSERT INTO {_TABLES[kind]} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
        f"ON CONFLICT ({', '.join(kind.KEY)}) DO UPDATE SET {changes}"
    )


def _select(
    connection: sqlite3.Connection, kind: type[R], where: dict[str, object], order: str = "position"
) -> list[R]:
    columns = _COLUMNS[kind]
    condition = " AND ".join(f"{column} = ?" for column in where) or "TRUE"
    query = f"SELECT {', '.join(columns)} FROM {_TABLES[kind]} WHERE {condition} ORDER BY {order}"
    rows = connection.execute(query, tuple(where.values())).fetchall()
    return [_record(kind, columns, row) for row in rows]


def _record(kind: type[R], columns: list[str], row: tuple[Any, ...]) -> R:
    try:
        values = [
            _ENUMS[column](value) if column in _ENUMS else value for column, value in zip(columns, row, strict=True)
        ]
    except ValueError as error:
        raise StateUnusable(f"table {_TABLES[kind]} holds a value that this version does not know: {error}") from error
    return cast("Callable[..., R]", kind)(*values)


def _only(found: list[R]) -> R | None:
    return found[0] if found else None


_UPSERTS: Final = {kind: _upsert(kind) for kind in _TABLES}
