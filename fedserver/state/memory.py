"""Twins of the store and the blobs that live in memory: for the simulator and for tests. Nothing survives them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from types import TracebackType
from typing import Self, TypeVar, cast

from fedcore.errors import NotFound
from fedcore.messages import WorkKind
from fedcore.names import check_name
from fedserver.state.base import Bytes
from fedserver.state.checks import check_digest, check_replaceable, check_sealed, record_key
from fedserver.state.records import (
    AssignmentRecord,
    AttemptRecord,
    BlobRecord,
    ClientRecord,
    JobRecord,
    Record,
    ReleaseRecord,
    TokenRecord,
    UpdateRecord,
    VersionRecord,
)

R = TypeVar("R")  # a class of record
_Key = tuple[object, ...]


class MemoryStore:
    """See `fedserver.state.base.Store`."""

    def __init__(self) -> None:
        self._tables: dict[type, dict[_Key, Record]] = {}
        self._lock = threading.Lock()

    def write(self, records: Sequence[Record]) -> None:
        """See `Store.write`."""
        with self._lock:
            staged: dict[tuple[type, _Key], Record] = {}
            for record in records:
                kind, key = type(record), record_key(record)
                existing = staged.get((kind, key)) or self._tables.get(kind, {}).get(key)
                if existing is not None:
                    check_replaceable(existing)
                staged[kind, key] = record
            for (kind, key), record in staged.items():
                self._tables.setdefault(kind, {})[key] = record

    def clients(self) -> list[ClientRecord]:
        """See `Store.clients`."""
        return sorted(self._all(ClientRecord), key=lambda record: record.name)

    def client(self, name: str) -> ClientRecord | None:
        """See `Store.client`."""
        return self._one(ClientRecord, name)

    def tokens(self) -> list[TokenRecord]:
        """See `Store.tokens`."""
        return self._all(TokenRecord)

    def token(self, secret_sha256: str) -> TokenRecord | None:
        """See `Store.token`."""
        return self._one(TokenRecord, secret_sha256)

    def jobs(self) -> list[JobRecord]:
        """See `Store.jobs`."""
        return self._all(JobRecord)

    def job(self, job_id: str) -> JobRecord | None:
        """See `Store.job`."""
        return self._one(JobRecord, job_id)

    def versions(self, job_id: str) -> list[VersionRecord]:
        """See `Store.versions`."""
        found = [record for record in self._all(VersionRecord) if record.job_id == job_id]
        return sorted(found, key=lambda record: record.version)

    def version(self, job_id: str, version: int) -> VersionRecord | None:
        """See `Store.version`."""
        return self._one(VersionRecord, job_id, version)

    def latest_version(self, job_id: str) -> VersionRecord | None:
        """See `Store.latest_version`."""
        versions = self.versions(job_id)
        return versions[-1] if versions else None

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """See `Store.attempts`."""
        return [record for record in self._all(AttemptRecord) if record.job_id == job_id]

    def assignments(
        self, job_id: str, version: int, attempt: int, kind: WorkKind | None = None
    ) -> list[AssignmentRecord]:
        """See `Store.assignments`."""
        return [
            record
            for record in self._all(AssignmentRecord)
            if (record.job_id, record.version, record.attempt) == (job_id, version, attempt)
            and kind in (None, record.kind)
        ]

    def assignment(self, assignment_id: str) -> AssignmentRecord | None:
        """See `Store.assignment`."""
        return self._one(AssignmentRecord, assignment_id)

    def updates(
        self, job_id: str, version: int, attempt: int | None = None, kind: WorkKind | None = None
    ) -> list[UpdateRecord]:
        """See `Store.updates`."""
        return [
            record
            for record in self._all(UpdateRecord)
            if (record.job_id, record.version) == (job_id, version)
            and attempt in (None, record.attempt)
            and kind in (None, record.kind)
        ]

    def update(self, update_id: str) -> UpdateRecord | None:
        """See `Store.update`."""
        return self._one(UpdateRecord, update_id)

    def releases(self, job_id: str) -> list[ReleaseRecord]:
        """See `Store.releases`."""
        return [record for record in self._all(ReleaseRecord) if record.job_id == job_id]

    def blob(self, digest: str) -> BlobRecord | None:
        """See `Store.blob`."""
        return self._one(BlobRecord, digest)

    def close(self) -> None:
        """See `Store.close`."""

    def _all(self, kind: type[R]) -> list[R]:
        with self._lock:
            return cast("list[R]", list(self._tables.get(kind, {}).values()))

    def _one(self, kind: type[R], *key: object) -> R | None:
        with self._lock:
            return cast("R | None", self._tables.get(kind, {}).get(key))


class MemoryBlobs:
    """See `fedserver.state.base.Blobs`."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._spools: dict[str, MemorySpool] = {}

    def put(self, data: Bytes, digest: str | None = None) -> str:
        """See `Blobs.put`."""
        content = bytes(data)
        digest = digest or hashlib.sha256(content).hexdigest()
        self._blobs[digest] = content
        return digest

    def writer(self) -> MemoryBlobWriter:
        """See `Blobs.writer`."""
        return MemoryBlobWriter(self)

    def scratch(self, num_bytes: int) -> memoryview:
        """See `Blobs.scratch`."""
        return memoryview(bytearray(num_bytes))

    def open(self, digest: str) -> memoryview:
        """See `Blobs.open`."""
        return memoryview(self._content(digest))

    def read(self, digest: str, offset: int, num_bytes: int) -> bytes:
        """See `Blobs.read`."""
        return self._content(digest)[offset : offset + num_bytes]

    def size(self, digest: str) -> int:
        """See `Blobs.size`."""
        return len(self._content(digest))

    def __contains__(self, digest: str) -> bool:
        return check_digest(digest) in self._blobs

    def delete(self, digest: str) -> None:
        """See `Blobs.delete`."""
        self._blobs.pop(check_digest(digest), None)

    def digests(self) -> Iterator[str]:
        """See `Blobs.digests`."""
        return iter(tuple(self._blobs))

    def spool(self, key: str) -> MemorySpool:
        """See `Blobs.spool`."""
        return self._spools.setdefault(check_name(key, "spool key"), MemorySpool(self, self._spools, key))

    def spools(self) -> Mapping[str, int]:
        """See `Blobs.spools`."""
        return {key: spool.num_bytes for key, spool in tuple(self._spools.items())}

    def discard_spools(self, keep: Set[str]) -> None:
        """See `Blobs.discard_spools`."""
        for key, spool in tuple(self._spools.items()):
            if key not in keep:
                spool.discard()

    def _content(self, digest: str) -> bytes:
        try:
            return self._blobs[check_digest(digest)]
        except KeyError as error:
            raise NotFound(f"there is no blob {digest}") from error


class MemoryBlobWriter:
    """See `fedserver.state.base.BlobWriter`."""

    def __init__(self, blobs: MemoryBlobs) -> None:
        self._blobs = blobs
        self._data = bytearray()

    def write(self, data: Bytes) -> None:
        """See `BlobWriter.write`."""
        self._data += data

    def commit(self) -> str:
        """See `BlobWriter.commit`."""
        return self._blobs.put(self._data)

    def discard(self) -> None:
        """See `BlobWriter.discard`."""
        self._data.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class MemorySpool:
    """See `fedserver.state.base.Spool`."""

    def __init__(self, blobs: MemoryBlobs, spools: dict[str, MemorySpool], key: str) -> None:
        self._blobs, self._spools, self._key = blobs, spools, key
        self._data = bytearray()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """See `Spool.num_bytes`."""
        return len(self._data)

    def append(self, data: Bytes) -> None:
        """See `Spool.append`."""
        with self._lock:
            self._check_open()
            self._data += data

    def seal(self, expected_sha256: str, expected_bytes: int) -> str:
        """See `Spool.seal`."""
        with self._lock:
            self._check_open()
            digest = hashlib.sha256(self._data).hexdigest()
            del self._spools[self._key]
            check_sealed(digest, len(self._data), expected_sha256, expected_bytes)
            return self._blobs.put(self._data)

    def discard(self) -> None:
        """See `Spool.discard`."""
        with self._lock:
            if self._spools.get(self._key) is self:
                del self._spools[self._key]

    def _check_open(self) -> None:
        if self._spools.get(self._key) is not self:
            raise NotFound(f"upload {self._key} is over: it was completed or given up")
