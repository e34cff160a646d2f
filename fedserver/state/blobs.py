"""Blobs as files: `blobs/ab/<sha256>`, complete or absent; `spool/<key>`, growing; `temporary/`, worth nothing.

A blob is written elsewhere on the same file system, flushed, renamed, and its folder flushed. So a crash at any moment
leaves the whole blob or none, and what lies in `temporary/` at the start can be thrown away.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from weakref import WeakValueDictionary

from fedcore.errors import NotFound, StorageFailed, UpdateRejected
from fedcore.names import check_name
from fedserver.state.base import Bytes
from fedserver.state.checks import check_digest, check_sealed
from fedserver.state.failures import storage_errors

_READ_BYTES: Final = 1 << 20


class FolderBlobs:
    """See `fedserver.state.base.Blobs`. The caller makes sure that no other process writes in `root`."""

    def __init__(self, root: Path) -> None:
        """Use `root`, making its folders where they are missing and removing what a crash left half written.

        Raises:
            StorageFailed: the folders cannot be made.
        """
        self._blobs, self._spool, self._temporary = root / "blobs", root / "spool", root / "temporary"
        self._spools: dict[str, FolderSpool] = {}
        self._mappings: WeakValueDictionary[str, mmap.mmap] = WeakValueDictionary()
        self._lock = threading.Lock()  # guards both dictionaries
        with storage_errors(f"prepare {root}"):
            for folder in (self._blobs, self._spool, self._temporary):
                folder.mkdir(mode=0o700, exist_ok=True)
            # All made at once, so that a commit has one folder to flush and never two.
            for first in range(256):
                (self._blobs / f"{first:02x}").mkdir(mode=0o700, exist_ok=True)
            flush_folder(self._blobs)
            flush_folder(root)
            for leftover in self._temporary.iterdir():
                leftover.unlink()

    def put(self, data: Bytes, digest: str | None = None) -> str:
        """See `Blobs.put`."""
        with self.writer(digest) as writer:
            writer.write(data)
            return writer.commit()

    def writer(self, digest: str | None = None) -> FolderBlobWriter:
        """See `Blobs.writer`; `digest`: of what will be written, if that is known."""
        return FolderBlobWriter(self, self._temporary / secrets.token_hex(16), digest)

    def scratch(self, num_bytes: int) -> memoryview:
        """See `Blobs.scratch`."""
        if num_bytes == 0:
            return memoryview(b"")
        path = self._temporary / secrets.token_hex(16)
        with storage_errors(f"write {path}"), path.open("x+b") as file:
            path.unlink()
            # Now: on a disk that is full, a write to the mapping would end the process.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return memoryview(mmap.mmap(file.fileno(), num_bytes))

    def open(self, digest: str) -> memoryview:
        """See `Blobs.open`."""
        # Whoever reads the same blob at the same time shares one mapping: pages count once, not for every download.
        with self._lock:
            if (mapping := self._mappings.get(digest)) is not None:
                return memoryview(mapping)
            path = self._path(digest)
            with storage_errors(f"read {path}"):
                try:
                    with path.open("rb") as file:
                        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
                            return memoryview(b"")
                        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except FileNotFoundError as error:
                    raise NotFound(f"there is no blob {digest}") from error
            self._mappings[digest] = mapping
            return memoryview(mapping)

    def read(self, digest: str, offset: int, num_bytes: int) -> bytes:
        """See `Blobs.read`."""
        path = self._path(digest)
        with storage_errors(f"read {path}"):
            try:
                with path.open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), num_bytes, offset)
            except FileNotFoundError as error:
                raise NotFound(f"there is no blob {digest}") from error

    def size(self, digest: str) -> int:
        """See `Blobs.size`."""
        path = self._path(digest)
        with storage_errors(f"read {path}"):
            try:
                return path.stat().st_size
            except FileNotFoundError as error:
                raise NotFound(f"there is no blob {digest}") from error

    def __contains__(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def delete(self, digest: str) -> None:
        """See `Blobs.delete`."""
        path = self._path(digest)
        with storage_errors(f"remove {path}"):
            path.unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """See `Blobs.digests`."""
        with storage_errors(f"list {self._blobs}"):
            for folder in self._blobs.iterdir():
                for path in folder.iterdir():
                    yield path.name

    def spool(self, key: str) -> FolderSpool:
        """See `Blobs.spool`."""
        path = self._spool / check_name(key, "spool key")
        with self._lock:
            spool = self._spools.get(key)
            if spool is None:
                spool = self._spools[key] = FolderSpool(self, path)
            return spool

    def spools(self) -> Mapping[str, int]:
        """See `Blobs.spools`."""
        with storage_errors(f"list {self._spool}"):
            sizes = {}
            for path in self._spool.iterdir():
                with suppress(FileNotFoundError):  # sealed while we look
                    sizes[path.name] = path.stat().st_size
            return sizes

    def discard_spools(self, keep: Set[str]) -> None:
        """See `Blobs.discard_spools`."""
        for key in self.spools():
            if key not in keep:
                self.spool(key).discard()

    def adopt(self, temporary: Path, descriptor: int, digest: str) -> None:
        """Make the flushed file a blob; only for this module's writers, which have computed `digest`.

        A file that is there already is replaced by the same bytes, which mends one that was damaged.
        """
        os.fsync(descriptor)
        path = self._path(digest)
        temporary.replace(path)
        flush_folder(path.parent)

    def forget(self, spool: FolderSpool) -> None:
        """Let go of a spool that is over."""
        with self._lock:
            self._spools.pop(spool.key, None)

    def _path(self, digest: str) -> Path:
        return self._blobs / check_digest(digest)[:2] / digest


class FolderBlobWriter:
    """See `fedserver.state.base.BlobWriter`."""

    def __init__(self, blobs: FolderBlobs, path: Path, digest: str | None) -> None:
        self._blobs, self._path, self._digest = blobs, path, digest
        self._hash = hashlib.sha256()
        with storage_errors(f"write {path}"):
            self._file = path.open("xb", buffering=0)

    def write(self, data: Bytes) -> None:
        """See `BlobWriter.write`."""
        view = memoryview(data).cast("B")
        with storage_errors(f"write {self._path}"):
            written = 0
            while written < len(view):
                written += self._file.write(view[written:])
        if self._digest is None:
            self._hash.update(view)

    def commit(self) -> str:
        """See `BlobWriter.commit`."""
        digest = self._digest or self._hash.hexdigest()
        with storage_errors(f"write {self._path}"):
            self._blobs.adopt(self._path, self._file.fileno(), digest)
            self._file.close()
        return digest

    def discard(self) -> None:
        """See `BlobWriter.discard`."""
        with storage_errors(f"remove {self._path}"):
            self._file.close()
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class FolderSpool:
    """See `fedserver.state.base.Spool`.

    It holds no open file: thousands of clients may be in the middle of an upload. Bytes beyond `num_bytes`, from an
    append that failed half way, are overwritten by the next one and cut off when sealing.
    """

    def __init__(self, blobs: FolderBlobs, path: Path) -> None:
        self.key = path.name
        self._blobs, self._path = blobs, path
        self._hash = hashlib.sha256()
        self._num_bytes: int | None = None  # None: the file has not been looked at
        self._over = False
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """See `Spool.num_bytes`."""
        if self._num_bytes is not None:
            return self._num_bytes
        with self._lock:
            return self._load()

    def append(self, data: Bytes) -> None:
        """See `Spool.append`."""
        view = memoryview(data).cast("B")
        with self._lock:
            self._check_not_over()
            start = self._load()
            with storage_errors(f"write {self._path}"), self._open() as file:
                written = 0
                while written < len(view):
                    written += os.pwrite(file.fileno(), view[written:], start + written)
            self._hash.update(view)
            self._num_bytes = start + len(view)

    def seal(self, expected_sha256: str, expected_bytes: int) -> str:
        """See `Spool.seal`."""
        with self._lock:
            self._check_not_over()
            num_bytes, digest = self._load(), self._hash.hexdigest()
            try:
                check_sealed(digest, num_bytes, expected_sha256, expected_bytes)
                with storage_errors(f"write {self._path}"), self._open() as file:
                    file.truncate(num_bytes)
                    self._blobs.adopt(self._path, file.fileno(), digest)
            except (UpdateRejected, StorageFailed):
                # After a flush that failed nobody knows what is on disk, and a second flush would claim success.
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                raise
            finally:
                self._finish()
            return digest

    def discard(self) -> None:
        """See `Spool.discard`."""
        with self._lock:
            if not self._over:
                with storage_errors(f"remove {self._path}"):
                    self._path.unlink(missing_ok=True)
                self._finish()

    def _load(self) -> int:
        """Take up what an earlier process wrote, and return how much there is."""
        if self._num_bytes is None:
            num_bytes = 0
            with storage_errors(f"read {self._path}"), suppress(FileNotFoundError), self._path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    self._hash.update(chunk)
                    num_bytes += len(chunk)
            self._num_bytes = num_bytes
        return self._num_bytes

    def _open(self) -> io.FileIO:
        return io.FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")

    def _finish(self) -> None:
        self._over = True
        self._blobs.forget(self)

    def _check_not_over(self) -> None:
        if self._over:
            raise NotFound(f"upload {self.key} is over: it was completed or given up")


def flush_folder(folder: Path) -> None:
    """Make new and removed names in `folder` durable; an `OSError` is the caller's to map."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
