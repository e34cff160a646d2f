"""A client's durable ledger: one line for each update that it has made, written before the update leaves.

``privacy-ledger.jsonl`` is only ever appended to. Each line has the SHA-256 of the line before it and of its own
content, so that no line can change, go or come unnoticed. ``privacy-ledger.head`` has the number of lines that are
known to be on disk, and the newest one's hash: no update leaves before it is written, and it is what tells a line that
a crash has cut short, of which nothing has left, from a file that has lost its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Final, NoReturn, Protocol

from pydantic import Field, ValidationError

from fedclient.releases import Accounts, Entry
from fedcore.errors import NotFound, StateUnusable, StorageFailed
from fedcore.messages import Digest
from fedcore.params import Params
from fedcore.privatefiles import flush_folder, read_private, write_private

LEDGER_FILE: Final = "privacy-ledger.jsonl"
HEAD_FILE: Final = "privacy-ledger.head"
MAX_LINE_BYTES: Final = 64 * 1024

_GENESIS: Final = hashlib.sha256(b"roundtable-privacy-ledger-v1").hexdigest()
_START: Final = b'{"hash":"'
_MIDDLE: Final = b'","entry":'
_BODY_AT: Final = len(_START) + 64 + len(_MIDDLE)
_log: Final = logging.getLogger(__name__)


class Ledger(Protocol):
    """Keeps what was released. Used on one thread."""

    def locked(self) -> AbstractContextManager[Accounts]:
        """Let nobody else append within the block, and give what is in the ledger.

        Raises:
            StateUnusable: it is damaged.
            StorageFailed: it cannot be opened.
        """
        ...

    def append(self, entry: Entry) -> None:
        """Note an update; durable when it returns. Only within `locked`.

        Raises:
            StorageFailed: it cannot be noted for certain, so the update must not leave.
        """
        ...


class MemoryLedger:
    """See `Ledger`. Nothing survives it: for the simulator."""

    def __init__(self) -> None:
        self._accounts = Accounts()

    @contextmanager
    def locked(self) -> Iterator[Accounts]:
        """See `Ledger.locked`."""
        yield self._accounts

    def append(self, entry: Entry) -> None:
        """See `Ledger.append`."""
        self._accounts.add(entry)


class _Head(Params):
    """How many lines are on disk for certain, and the hash of the last one."""

    lines: Annotated[int, Field(ge=0)]
    hash: Digest


class FileLedger:
    """See `Ledger`. What is in memory is one account a job; the file may have grown since, by another process.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._head_path = folder / LEDGER_FILE, folder / HEAD_FILE
        self._accounts = Accounts()
        self._head = _Head(lines=0, hash=_GENESIS)
        self._end = 0  # of the last line, in bytes
        self._descriptor = -1

    @contextmanager
    def locked(self) -> Iterator[Accounts]:
        """See `Ledger.locked`. A line that a crash has cut short is removed."""
        try:
            descriptor = self._open()
        except OSError as error:
            raise StorageFailed(f"cannot open {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            confirmed = self._read_on(descriptor)
            try:
                if (torn := os.fstat(descriptor).st_size - self._end) > 0:
                    _log.warning("line cut short is removed", extra={"file": str(self._path), "bytes": torn})
                    os.ftruncate(descriptor, self._end)
                if confirmed < self._head.lines:
                    os.fsync(descriptor)
            except OSError as error:
                raise StorageFailed(f"cannot mend {self._path}: {error.strerror}") from error
            if confirmed < self._head.lines:  # nothing of it has left, perhaps; it counts all the same
                self._write_head(self._head)
            self._descriptor = descriptor
            yield self._accounts
        finally:
            self._descriptor = -1
            os.close(descriptor)

    def read(self) -> Accounts:
        """Return what is in the ledger, and change nothing.

        Raises:
            StateUnusable: it is damaged, or cannot be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            if self._read_head().lines:
                self._fail("is missing")
            return self._accounts
        except OSError as error:
            raise StateUnusable(f"cannot read {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._read_on(descriptor)
        finally:
            os.close(descriptor)
        return self._accounts

    def append(self, entry: Entry) -> None:
        """See `Ledger.append`."""
        body = json.dumps(entry.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode("ascii")
        head = _Head(lines=self._head.lines + 1, hash=_hash_of(self._head.hash, body))
        line = _START + head.hash.encode("ascii") + _MIDDLE + body + b"}\n"
        left = memoryview(line)
        try:
            while left:
                written = os.pwrite(self._descriptor, left, self._end + len(line) - len(left))
                left = left[written:]
            os.fsync(self._descriptor)
        except OSError as error:  # what is there of the line is removed, or counted, when the file is next opened
            raise StorageFailed(f"cannot write {self._path}: {error.strerror}") from error
        self._write_head(head)
        self._head, self._end = head, self._end + len(line)
        self._accounts.add(entry)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            if self._head.lines or self._read_head().lines:
                self._fail("is missing")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        flush_folder(self._path.parent)
        return descriptor

    def _read_on(self, descriptor: int) -> int:
        """Read what has come since, and return how many lines are known to be on disk."""
        confirmed = self._read_head()
        if confirmed.lines < self._head.lines:
            self._fail(f"has {self._head.lines} lines, of which {self._head_path.name} knows {confirmed.lines}")
        self._check(confirmed)
        with open(descriptor, "rb", closefd=False) as file:
            if file.seek(0, os.SEEK_END) < self._end:
                self._fail("has lost its end")
            file.seek(self._end)
            while (line := file.readline(MAX_LINE_BYTES + 1)).endswith(b"\n"):
                self._take(line)
                self._check(confirmed)
            if len(line) > MAX_LINE_BYTES:
                self._fail(f"line {self._head.lines + 1} has more than {MAX_LINE_BYTES} bytes")
        if not confirmed.lines <= self._head.lines <= confirmed.lines + 1:
            self._fail(f"has {self._head.lines} lines, of which {self._head_path.name} knows {confirmed.lines}")
        return confirmed.lines

    def _take(self, line: bytes) -> None:
        body = line[_BODY_AT:-2]
        digest = _hash_of(self._head.hash, body)
        if line != _START + digest.encode("ascii") + _MIDDLE + body + b"}\n":
            self._fail(f"line {self._head.lines + 1} is not what was written there, or a line before it is missing")
        try:
            entry = Entry.model_validate_json(body, strict=True)
        except ValidationError as error:
            self._fail(f"line {self._head.lines + 1} cannot be read; was it written by a newer version?", error)
        self._accounts.add(entry)
        self._head, self._end = _Head(lines=self._head.lines + 1, hash=digest), self._end + len(line)

    def _check(self, confirmed: _Head) -> None:
        if self._head.lines == confirmed.lines and self._head.hash != confirmed.hash:
            self._fail(f"and {self._head_path.name} do not belong together at line {confirmed.lines}")

    def _read_head(self) -> _Head:
        try:
            return _Head.model_validate_json(read_private(self._head_path), strict=True)
        except NotFound:
            return _Head(lines=0, hash=_GENESIS)
        except ValidationError as error:
            self._fail(f"cannot be trusted: {self._head_path.name} cannot be read", error)

    def _write_head(self, head: _Head) -> None:
        write_private(self._head_path, head.model_dump_json().encode("ascii") + b"\n")

    def _fail(self, what: str, error: Exception | None = None) -> NoReturn:
        raise StateUnusable(
            f"the privacy ledger {self._path} {what}. It says what this client has released, so nothing is released"
            " without it: restore both files from a backup that is not older"
        ) from error


def _hash_of(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode("ascii") + body).hexdigest()
