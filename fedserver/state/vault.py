"""Bytes of any size under their SHA-256: small ones as records of the store, large ones as blobs.

A blob costs two flushes of the disk. What is small is cheaper as a `BlobRecord`, which becomes durable in the same
transaction as the record that names it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from fedcore.errors import NotFound, StateUnusable
from fedserver.state.base import Blobs, BlobWriter, Bytes, Store
from fedserver.state.records import BlobRecord, VersionRecord

SMALL_BYTES: Final = 128 << 10
"""Up to this size the store is quicker."""
RELEASE_BYTES: Final = 8 << 20
RELEASE_ITEMS: Final = 8

T = TypeVar("T")


class Kept(NamedTuple):
    """Bytes that are durable, or will be as soon as `record` is journaled (None: they are)."""

    digest: str
    record: BlobRecord | None


class Vault:
    """Reads and writes over a store and its blobs. May be used from any thread.

    Who reads here has the digest from a record. So bytes that are not there, or not as many, are damage, never a wrong
    question.
    """

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    def put(self, data: bytes, digest: str) -> Kept:
        """Keep `data`, whose SHA-256 the caller has computed. A large one is durable when this returns."""
        if len(data) <= SMALL_BYTES:
            return Kept(digest, BlobRecord(digest, data))
        return Kept(self._blobs.put(data, digest), None)

    def writer(self) -> VaultWriter:
        """Return a writer for bytes that are not all in memory."""
        return VaultWriter(self._blobs)

    def scratch(self, num_bytes: int) -> memoryview:
        """Return bytes to write to and read again, for as long as somebody holds them: too many for memory."""
        return self._blobs.scratch(num_bytes)

    def open(self, kept: str | Kept, num_bytes: int | None = None) -> memoryview:
        """Return the bytes, read-only.

        Args:
            kept: what, or its digest.
            num_bytes: how many there must be, if the caller knows.

        Raises:
            StateUnusable: there are none of that digest, or not that many.
        """
        if isinstance(kept, Kept):
            if kept.record is not None:
                return memoryview(kept.record.data)
            kept = kept.digest
        with _named(kept):
            record = self._store.blob(kept)
            data = self._blobs.open(kept) if record is None else memoryview(record.data)
        if num_bytes is not None:
            check_size(kept, len(data), num_bytes)
        return data

    def changes(self, latest: VersionRecord) -> list[str]:
        """Return the digests of the changes that led to the frozen matrices of a version, the oldest first."""
        if not latest.changed_since:
            return []
        rows = [
            latest if number == latest.version else self._store.version(latest.job_id, number)
            for number in range(latest.changed_since, latest.version + 1)
        ]
        return [row.change_blob for row in rows if row is not None and row.change_blob is not None]

    def read(self, digest: str, offset: int, num_bytes: int) -> bytes:
        """Return a copy of the bytes from `offset` on, at most `num_bytes`.

        Raises:
            StateUnusable: there are none of that digest.
        """
        with _named(digest):
            record = self._store.blob(digest)
            if record is None:
                return self._blobs.read(digest, offset, num_bytes)
            return record.data[offset : offset + num_bytes]

    def size(self, digest: str) -> int:
        """Return the number of bytes.

        Raises:
            StateUnusable: there are none of that digest.
        """
        with _named(digest):
            record = self._store.blob(digest)
            return self._blobs.size(digest) if record is None else len(record.data)

    def check(self, digest: str, what: str) -> None:
        """Compare the bytes with their digest; `what` they are goes into the error.

        Raises:
            StateUnusable: there are none, or others.
        """
        found, num_bytes = hashlib.sha256(), 0
        try:
            while part := self.read(digest, num_bytes, RELEASE_BYTES):
                found.update(part)
                num_bytes += len(part)
        except StateUnusable as error:
            raise StateUnusable(f"{error}: {what}") from error
        if found.hexdigest() != digest:
            raise StateUnusable(
                f"blob {digest} is damaged: {what}; {num_bytes} bytes are there, their SHA-256 is {found.hexdigest()}"
            )


def check_size(digest: str, num_bytes: int, expected: int) -> None:
    """Compare how many bytes a blob has with how many it was written with.

    Raises:
        StateUnusable: they differ.
    """
    if num_bytes != expected:
        raise StateUnusable(f"blob {digest} is damaged: {num_bytes} bytes are there, {expected} were written")


@contextmanager
def _named(digest: str) -> Iterator[None]:
    """Read what a record names."""
    try:
        yield
    except NotFound as error:
        raise StateUnusable(f"blob {digest} is missing") from error


class VaultWriter:
    """Bytes being written by one thread. As a context manager it discards what was not committed."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._small = bytearray()
        self._large: BlobWriter | None = None  # once it is more than small

    def write(self, data: Bytes) -> None:
        """Add `data` to the end."""
        view = memoryview(data).cast("B")
        if self._large is None and len(self._small) + len(view) <= SMALL_BYTES:
            self._small += view
            return
        if self._large is None:
            self._large = self._blobs.writer()
            self._large.write(self._small)
            self._small.clear()
        self._large.write(view)

    def commit(self) -> Kept:
        """Return what was written, durable but for the record of something small."""
        if self._large is not None:
            return Kept(self._large.commit(), None)
        data = bytes(self._small)
        digest = hashlib.sha256(data).hexdigest()
        return Kept(digest, BlobRecord(digest, data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._large is not None:
            self._large.discard()


def release(view: memoryview) -> None:
    """Give back the memory of a mapped file; what is read again comes from the file again."""
    if isinstance(view.obj, mmap.mmap):
        view.obj.madvise(mmap.MADV_DONTNEED)


def passing(items: Iterable[T], view: memoryview) -> Iterator[T]:
    """Yield what is read from `view` a megabyte at a time, one after the other; keep little of that file in memory."""
    for count, item in enumerate(items, 1):
        yield item
        if count % RELEASE_ITEMS == 0:
            release(view)
    release(view)
