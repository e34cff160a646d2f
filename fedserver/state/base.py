"""The contract of the state: the store that keeps records and the blobs that keep bytes.

Small facts are *records* in a `Store`; anything large is a *blob*, named by its SHA-256. A record that names a blob is
written after the blob is durable, or together with it, so a crash leaves at most a blob that nothing names.

Errors: a `Refused` says that the write contradicts what is recorded (nothing was written, the store is well); a
`StateError` says that the storage itself failed, and then nothing more should be written to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from fedcore.messages import WorkKind
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


class Store(Protocol):
    """Keeps records.

    Synchronous: `write` is called on one thread at a time (`Journal` sees to that), and blocks for as long as the
    disk takes; reads may be called from any thread, at any time, and see every finished `write`.

    Lists are in the order in which their records were first written, but for clients (by name) and versions (by
    number). Every method raises `StorageFailed` (full, read-only, input/output error) or `StateUnusable` (damaged).
    """

    def write(self, records: Sequence[Record]) -> None:
        """Insert `records`, or replace those of the same key: all or none; durable when it returns.

        Raises:
            UpdateRejected: DUPLICATE, an update of that id is recorded.
            Unauthenticated: a token that is recorded as used.
        """
        ...

    def clients(self) -> list[ClientRecord]:
        """Return every client, revoked ones too."""
        ...

    def client(self, name: str) -> ClientRecord | None:
        """Return the client of that name."""
        ...

    def tokens(self) -> list[TokenRecord]:
        """Return every token, used and expired ones too."""
        ...

    def token(self, secret_sha256: str) -> TokenRecord | None:
        """Return the token whose secret has that SHA-256 (hex)."""
        ...

    def jobs(self) -> list[JobRecord]:
        """Return every job."""
        ...

    def job(self, job_id: str) -> JobRecord | None:
        """Return the job of that id."""
        ...

    def versions(self, job_id: str) -> list[VersionRecord]:
        """Return a job's versions, the lowest first."""
        ...

    def version(self, job_id: str, version: int) -> VersionRecord | None:
        """Return one version of a job."""
        ...

    def latest_version(self, job_id: str) -> VersionRecord | None:
        """Return the version with the highest number."""
        ...

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """Return a job's attempts."""
        ...

    def assignments(
        self, job_id: str, version: int, attempt: int, kind: WorkKind | None = None
    ) -> list[AssignmentRecord]:
        """Return the assignments of an attempt; `kind` tells the training from the evaluation of one version."""
        ...

    def assignment(self, assignment_id: str) -> AssignmentRecord | None:
        """Return the assignment of that id."""
        ...

    def updates(
        self, job_id: str, version: int, attempt: int | None = None, kind: WorkKind | None = None
    ) -> list[UpdateRecord]:
        """Return the updates of a version, if wanted only those of one attempt or kind; rejected ones too."""
        ...

    def update(self, update_id: str) -> UpdateRecord | None:
        """Return the update of that id."""
        ...

    def releases(self, job_id: str) -> list[ReleaseRecord]:
        """Return what a job's clients have let out."""
        ...

    def blob(self, digest: str) -> BlobRecord | None:
        """Return the small blob of that SHA-256 (hex)."""
        ...

    def close(self) -> None:
        """Release everything; closing twice is harmless, any other call afterwards is a bug."""
        ...


# -- blobs -----------------------------------------------------------------------------------------------------------

Bytes: TypeAlias = bytes | bytearray | memoryview


class BlobWriter(Protocol):
    """A blob being written by one thread. As a context manager it discards what was not committed."""

    def write(self, data: Bytes) -> None:
        """Add `data` to the end."""
        ...

    def commit(self) -> str:
        """Make the blob durable and visible, in one step, and return its digest."""
        ...

    def discard(self) -> None:
        """Forget what was written; nothing happens after a commit."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Spool(Protocol):
    """A blob that arrives in pieces, possibly over several connections and restarts of the server.

    There is one object for a key, whoever asks; its methods may be called from any thread. What is appended survives
    the death of the process; after a loss of power it may be shorter, so a sender always asks for `num_bytes` first.
    A spool does not know how much it may take: the caller compares with the announced size *before* appending.
    """

    @property
    def num_bytes(self) -> int:
        """How much has arrived: the offset at which to resume."""
        ...

    def append(self, data: Bytes) -> None:
        """Add `data` to the end.

        Raises:
            StorageFailed: it is not added; `num_bytes` is as before.
            NotFound: the spool was sealed or discarded meanwhile.
        """
        ...

    def seal(self, expected_sha256: str, expected_bytes: int) -> str:
        """Make a blob of it, durable when this returns, and return its digest.

        Raises:
            UpdateRejected: WRONG_SIZE or WRONG_DIGEST; the spool is discarded, the sender must begin anew.
            StorageFailed: likewise discarded.
            NotFound: the spool was sealed or discarded meanwhile.
        """
        ...

    def discard(self) -> None:
        """Forget what arrived; nothing happens if it is gone already."""
        ...


class Blobs(Protocol):
    """Keeps bytes under their SHA-256 (64 lower-case hex digits). All methods may be called from any thread.

    Every method raises `StorageFailed` when the storage fails, and `InvalidInput` for what is not a digest.
    """

    def put(self, data: Bytes, digest: str | None = None) -> str:
        """Keep `data`, durably, and return its digest. Keeping the same bytes twice is harmless.

        Args:
            data: the bytes.
            digest: their SHA-256 (hex), if the caller has computed it already.
        """
        ...

    def writer(self) -> BlobWriter:
        """Return a writer for a blob whose bytes are not all in memory."""
        ...

    def scratch(self, num_bytes: int) -> memoryview:
        """Return so many bytes to write to and read again, of the disk where there is one; gone with the last view."""
        ...

    def open(self, digest: str) -> memoryview:
        """Return the bytes, read-only; they stay readable after a `delete`.

        Raises:
            NotFound: there is no such blob.
        """
        ...

    def read(self, digest: str, offset: int, num_bytes: int) -> bytes:
        """Return a copy of the bytes from `offset` on, at most `num_bytes`, without keeping anything open.

        Raises:
            NotFound: there is no such blob.
        """
        ...

    def size(self, digest: str) -> int:
        """Return the number of bytes.

        Raises:
            NotFound: there is no such blob.
        """
        ...

    def __contains__(self, digest: str) -> bool: ...

    def delete(self, digest: str) -> None:
        """Remove a blob; nothing happens if there is none."""
        ...

    def digests(self) -> Iterator[str]:
        """Go over the digests of all blobs, in no particular order."""
        ...

    def spool(self, key: str) -> Spool:
        """Return the spool of `key`, with what arrived before; the first call after a restart reads all of that.

        Raises:
            InvalidInput: `key` is not a name (`fedcore.names`).
        """
        ...

    def spools(self) -> Mapping[str, int]:
        """Return the keys of all unsealed spools and how many bytes have arrived."""
        ...

    def discard_spools(self, keep: Set[str]) -> None:
        """Discard every spool whose key is not in `keep`."""
        ...
